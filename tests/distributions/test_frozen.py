"""Log-probability and entropy of parts, and copies that share nothing."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import torch.distributions as td
from families import FAMILIES
from networks import SAMPLES
from pairs import pair, parts
from torch import Tensor
from torch.distributions import Categorical, Distribution, Independent, Normal
from torch.distributions.transforms import AffineTransform, ComposeTransform, TanhTransform

from trpo_optim import (
    TrustRegionError,
    entropy,
    frozen,
    log_prob,
)


def test_log_probability_and_entropy_are_summed_over_parts() -> None:
    dist, _ = pair(FAMILIES["tuple (MultiDiscrete)"])
    actions = [each.sample() for each in dist]
    expected = sum(each.log_prob(action) for each, action in zip(dist, actions, strict=True))
    torch.testing.assert_close(log_prob(dist, actions), expected)
    torch.testing.assert_close(log_prob(dist, torch.stack(actions, -1)), expected)
    torch.testing.assert_close(entropy(dist), sum(each.entropy() for each in dist))
    parts, _ = pair(FAMILIES["dict (Dict)"])
    moves = {name: each.sample() for name, each in parts.items()}
    expected = sum(each.log_prob(moves[name]) for name, each in parts.items())
    torch.testing.assert_close(log_prob(parts, moves), expected)


def test_a_mask_says_which_dimensions_of_log_probabilities_are_the_batchs() -> None:
    torch.manual_seed(0)
    dist, actions = td.Normal(torch.zeros(4, 5, 3), 1.0), torch.randn(4, 5, 3)
    each, mask = dist.log_prob(actions), torch.rand(4, 5) > 0.5
    torch.testing.assert_close(log_prob(dist, actions, mask), each.sum(-1) * mask)
    apart = torch.ones(4, 5, 3, dtype=torch.bool)
    torch.testing.assert_close(log_prob(dist, actions, apart), each)
    joint = log_prob((dist, dist), (actions, actions), torch.ones(4))
    torch.testing.assert_close(joint, 2 * each.sum((1, 2)))


def test_what_is_plain_needs_no_mask() -> None:
    torch.manual_seed(0)
    tokens = td.Categorical(logits=torch.randn(4, 5, 3))
    chosen = tokens.sample()
    torch.testing.assert_close(log_prob(tokens, chosen), tokens.log_prob(chosen))
    scalar = td.Normal(torch.zeros(4), 1.0)
    several = scalar.sample((6,))
    torch.testing.assert_close(log_prob(scalar, several), scalar.log_prob(several))
    torch.testing.assert_close(log_prob(td.Normal(0.0, 1.0), several), scalar.log_prob(several))


@pytest.mark.parametrize("name", FAMILIES)
def test_a_frozen_copy_shares_neither_graph_nor_memory(name: str) -> None:
    torch.manual_seed(0)
    x = torch.randn(SAMPLES, 6, requires_grad=True)
    free = torch.randn(3, requires_grad=True)
    dist = FAMILIES[name].make(x, free)
    action = [each.sample() for each in parts(dist)]
    before = [each.log_prob(a).detach() for each, a in zip(parts(dist), action, strict=True)]
    copied = frozen(dist)
    assert type(copied) is type(dist)
    for tensor in held_by(dist):
        tensor.data.zero_()  # the very memory
    for each, a, expected in zip(parts(copied), action, before, strict=True):
        value = each.log_prob(a)
        assert not value.requires_grad
        torch.testing.assert_close(value, expected, rtol=0, atol=0)


def held_by(value: Any) -> list[Tensor]:
    if isinstance(value, Tensor):
        return [value]
    if isinstance(value, Distribution):
        value = vars(value)
    if not isinstance(value, dict | list | tuple):
        return []
    within = value.values() if isinstance(value, dict) else value
    return [each for part in within for each in held_by(part)]


def test_transforms_are_frozen_too() -> None:
    scale = torch.full((3,), 2.0, requires_grad=True)
    chain = ComposeTransform([AffineTransform(torch.zeros(3), scale), TanhTransform(cache_size=1)])
    dist = td.TransformedDistribution(td.Normal(torch.zeros(4, 3), 1.0), [chain])
    dist.rsample()
    copied = frozen(dist)
    with torch.no_grad():
        scale.zero_()
    inner: Any = copied.transforms[0]
    assert inner.parts[0].scale.tolist() == [2.0] * 3
    assert not copied.rsample().requires_grad


def test_the_entropy_takes_a_mask_as_the_log_probability_does() -> None:
    mask = torch.tensor([[True, False], [True, True]])
    normal = Normal(torch.zeros(2, 2, 3), 1.0)
    expected = 1.5 * math.log(2 * math.pi * math.e) * mask
    torch.testing.assert_close(entropy(normal, mask), expected)
    both = {"stick": Independent(normal, 1), "button": Categorical(logits=torch.zeros(2, 2, 4))}
    torch.testing.assert_close(entropy(both, mask), expected + math.log(4) * mask)
    with pytest.raises(TrustRegionError, match="mask"):
        entropy(normal, torch.ones(3, 3, dtype=torch.bool))
