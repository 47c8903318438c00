"""Distributions of other libraries: what their shapes do not say, their log-probabilities do."""

from __future__ import annotations

import pytest
import torch
import torch.distributions as td
from torch import Tensor
from torch.distributions import kl_divergence
from torchrl_like import Composite, Nested, OneHot

from trpo_optim import (
    TrustRegionError,
    TrustRegionOptimizer,
    entropy,
    frozen,
    joint_kl,
    log_prob,
    mean_kl,
    sample,
)


def composite(x: Tensor) -> Composite:
    return Composite(
        len(x),
        {
            "stick": td.Normal(x[:, :4], 1.0),
            ("hand", "button"): OneHot(x[:, 4:]),
        },
    )


def test_one_hot_actions_of_a_family_without_an_event_shape_are_one_each() -> None:
    torch.manual_seed(0)
    for actions in (5, 3):  # as many as rows, too
        logits = torch.randn(5, actions)
        dist, plain = OneHot(logits), td.Categorical(logits=logits)
        drawn = sample(dist)
        expected = plain.log_prob(drawn.argmax(-1))
        torch.testing.assert_close(log_prob(dist, drawn), expected)
        torch.testing.assert_close(log_prob(dist, drawn.float()), expected)
        several = dist.sample((7,))
        torch.testing.assert_close(log_prob(dist, several), plain.log_prob(several.argmax(-1)))
        moved = OneHot(logits + torch.randn(5, actions))
        exact = kl_divergence(plain, td.Categorical(logits=moved.logits)).mean()
        torch.testing.assert_close(mean_kl(frozen(dist), moved), exact)


@pytest.mark.parametrize(
    ("dist", "shape"),
    [
        (td.Categorical(logits=torch.zeros(4, 3)), (4, 3)),
        (td.Categorical(logits=torch.zeros(4, 3)), (4, 1)),
        (td.Categorical(logits=torch.zeros(4, 3)), (5,)),
        (td.Categorical(logits=torch.zeros(4, 3)), ()),
        (td.Normal(torch.zeros(4), 1.0), (4, 1)),
        (td.Independent(td.Normal(torch.zeros(4, 3), 1.0), 1), (4, 1)),
        (td.Independent(td.Normal(torch.zeros(4, 3), 1.0), 1), (3,)),
        (OneHot(torch.zeros(4, 3)), (3,)),
        (OneHot(torch.zeros(4, 3)), (1, 3)),
    ],
)
def test_actions_that_would_broadcast_are_refused(dist: td.Distribution, shape: tuple[int]) -> None:
    with pytest.raises(TrustRegionError, match=r"actions have shape .* would broadcast"):
        log_prob(dist, torch.zeros(shape))


def test_a_distribution_that_is_a_dict_is_the_sum_of_its_parts() -> None:
    torch.manual_seed(0)
    x = torch.randn(6, 7)
    old, new = composite(x), composite(x + 0.1 * torch.randn(6, 7))
    actions = old.sample()
    torch.testing.assert_close(log_prob(new, actions), new.log_prob(actions))
    flat = {name: actions[name] for name in new}
    torch.testing.assert_close(log_prob(new, flat), new.log_prob(actions))
    button = ("hand", "button")
    shift = (old["stick"].loc - new["stick"].loc).square().sum(-1) / 2
    choice = kl_divergence(*(td.Categorical(logits=each[button].logits) for each in (old, new)))
    torch.testing.assert_close(joint_kl(frozen(old), new), shift + choice)
    every = torch.ones(6, dtype=torch.bool)
    torch.testing.assert_close(mean_kl(frozen(old), new, every), (shift + choice).mean())
    spread = old["stick"].entropy().sum(-1) + old[button].entropy()
    torch.testing.assert_close(entropy(old), spread)
    torch.testing.assert_close(log_prob(old, sample(old)), old.log_prob(actions), rtol=9, atol=9)
    with pytest.raises(TrustRegionError, match="their parts do not fit"):
        log_prob(new, Nested({"stick": actions["stick"]}))


def test_a_step_of_a_distribution_that_is_a_dict_keeps_the_radius() -> None:
    torch.manual_seed(0)
    layer = torch.nn.Linear(5, 7)
    observations, advantages = torch.randn(200, 5), torch.randn(200)
    old = frozen(composite(layer(observations)))
    actions = old.sample()
    before = log_prob(old, actions)

    def closure() -> tuple[Tensor, Tensor, Composite]:
        new = composite(layer(observations))
        ratio = (log_prob(new, actions) - before).exp()
        return -(ratio * advantages).mean(), mean_kl(old, new), new

    report = TrustRegionOptimizer(layer.parameters()).step(closure)
    assert report.accepted
    assert report.kl <= 0.01
    with torch.no_grad():
        exact = joint_kl(old, composite(layer(observations))).mean().item()
    assert report.kl == pytest.approx(exact, rel=1e-4)


class Bare(td.Distribution):
    """A distribution that does not call ``super().__init__``."""

    arg_constraints = {}  # noqa: RUF012  # torch declares it so

    def __init__(self, loc: Tensor) -> None:
        self.loc = loc

    def log_prob(self, value: Tensor) -> Tensor:
        return -0.5 * (value - self.loc).square()


def test_a_distribution_without_shapes_is_named() -> None:
    bare = Bare(torch.zeros(4))
    for call in (
        lambda: log_prob(bare, torch.zeros(4)),
        lambda: mean_kl(Bare(torch.ones(4)), bare),
        lambda: frozen((bare,)),
    ):
        with pytest.raises(TrustRegionError, match=r"^Bare has no batch_shape.*super\(\).__init__"):
            call()
