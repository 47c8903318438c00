"""The KL of every family, joint over the parts of an action and averaged over the batch."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributions as td
from families import FAMILIES, without_some
from networks import SAMPLES
from pairs import one, pair, parts
from profiles import problems
from torch import Tensor
from torch.distributions import Distribution, kl_divergence
from torch.distributions.transforms import TanhTransform

from trpo_optim import (
    TrustRegionError,
    frozen,
    joint_kl,
    log_prob,
    mean_kl,
    sample,
    sampled_kl,
)

CLOSED = [name for name, family in FAMILIES.items() if not family.sampled]


@pytest.mark.parametrize("name", CLOSED)
def test_the_kl_is_the_mean_log_ratio_of_many_samples(name: str) -> None:
    family = FAMILIES[name]
    old, new = pair(family)
    torch.manual_seed(1)
    draws = 400 * min(problems(), 100)
    counted = family.mask(SAMPLES) if family.mask else torch.ones(SAMPLES, dtype=torch.bool)
    total, variance = torch.zeros(2, int(counted.sum()), dtype=torch.float64)
    for ours, theirs in zip(parts(old), parts(new), strict=True):
        actions = ours.sample((draws,))
        ratios = (ours.log_prob(actions) - theirs.log_prob(actions))[:, counted]
        total += ratios.mean(0)
        variance += ratios.var(0) / draws
    error = 4 * variance.sum().sqrt().item() / len(total)
    assert mean_kl(old, new, family.mask(SAMPLES) if family.mask else None).item() == pytest.approx(
        total.mean().item(), abs=error
    )


@pytest.mark.parametrize("name", CLOSED)
def test_the_kl_of_a_frozen_copy_is_zero(name: str) -> None:
    family = FAMILIES[name]
    old, _ = pair(family)
    kl = mean_kl(frozen(old), old, family.mask(SAMPLES) if family.mask else None)
    assert kl.item() == pytest.approx(0, abs=1e-14)


def test_kls_of_categoricals_can_be_mapped_over_a_further_dimension() -> None:
    torch.manual_seed(0)
    logits = torch.randn(2, 3, 4, 5, dtype=torch.float64)
    logits[..., 1] = -math.inf

    def kl(old: Tensor, new: Tensor) -> Tensor:
        dists = [td.Categorical(logits=each, validate_args=False) for each in (old, new)]
        return joint_kl(dists[0], dists[1])

    one_by_one = torch.stack([kl(*each) for each in zip(*logits, strict=True)])
    torch.testing.assert_close(torch.vmap(kl)(*logits), one_by_one)


def test_parts_are_joint_and_elements_averaged() -> None:
    old, new = pair(FAMILIES["dict (Dict)"])
    expected = torch.stack([kl_divergence(old[key], new[key]) for key in old]).sum(0)
    torch.testing.assert_close(mean_kl(old, new), expected.mean())
    nested = mean_kl({"a": old, "b": (old["gear"],)}, {"a": new, "b": [new["gear"]]})
    gear = kl_divergence(old["gear"], new["gear"])
    torch.testing.assert_close(nested, (expected + gear).mean())


def test_a_mask_leaves_out_what_it_covers() -> None:
    torch.manual_seed(0)
    logits = torch.randn(2, 5, 7, 3).double()
    mask = torch.arange(5) < torch.tensor([[1], [2], [5], [3], [4], [0], [5]])
    mask = mask.T
    old, new = td.Categorical(logits=logits[0]), td.Categorical(logits=logits[1])
    expected = kl_divergence(old, new)[mask].mean()
    torch.testing.assert_close(mean_kl(old, new, mask), expected)
    torch.testing.assert_close(mean_kl(old, new, mask.double()), expected)
    spoilt = logits[1].masked_fill(~mask[..., None], torch.nan)
    spoilt_new = td.Categorical(logits=spoilt, validate_args=False)
    torch.testing.assert_close(mean_kl(old, spoilt_new, mask), expected)


def test_dimensions_beyond_the_mask_belong_to_the_action() -> None:
    torch.manual_seed(0)
    old, new = (td.Normal(torch.randn(4, 5, 3), 1.0) for _ in range(2))
    per_step = kl_divergence(old, new).sum(-1)
    mask = torch.rand(4, 5) > 0.3
    torch.testing.assert_close(mean_kl(old, new, mask), per_step[mask].mean())
    old_joint, new_joint = td.Independent(old, 1), td.Independent(new, 1)
    torch.testing.assert_close(mean_kl(old_joint, new_joint, mask), per_step[mask].mean())
    torch.testing.assert_close(mean_kl(old_joint, new_joint), per_step.mean())


def test_the_kl_of_padded_sequences_leaves_padding_out() -> None:
    torch.manual_seed(0)
    lengths = torch.tensor([1, 2, 5, 3, 4, 0, 5])
    mask = torch.arange(5) < lengths[:, None]
    old, new = (td.Categorical(logits=torch.randn(7, 5, 3).double()) for _ in range(2))
    of_tokens = kl_divergence(old, new)
    expected = torch.stack(
        [of_tokens[row, :length].sum() for row, length in enumerate(lengths) if length]
    )
    torch.testing.assert_close(mean_kl(old, new, mask, per="sequence"), expected.mean())
    torch.testing.assert_close(joint_kl(old, new, mask, per="sequence"), expected)
    tokens = old.sample()
    logs = old.log_prob(tokens), new.log_prob(tokens)
    estimate = torch.where(mask, logs[0] - logs[1], 0).sum(1).sum() / 6
    torch.testing.assert_close(sampled_kl(*logs, mask, per="sequence"), estimate)


@pytest.mark.parametrize(
    "dist",
    [
        td.Categorical(logits=torch.zeros(4, 5, 3)),
        td.Independent(td.Normal(torch.zeros(4, 5, 3), 1.0), 1),
    ],
    ids=["tokens", "vectors"],
)
def test_a_mask_of_whole_sequences_is_refused(dist: td.Distribution) -> None:
    mask = torch.ones(4, dtype=torch.bool)
    with pytest.raises(TrustRegionError, match=r"mask is 1-dimensional.*per='sequence'"):
        mean_kl(frozen(dist), dist, mask)
    with pytest.raises(TrustRegionError, match=r"mask is 1-dimensional.*per='sequence'"):
        log_prob(dist, sample(dist), mask)


def test_a_mean_is_over_tokens_or_sequences() -> None:
    dist = td.Categorical(logits=torch.zeros(4, 5))
    with pytest.raises(TrustRegionError, match=r"per is 'batch'; it must be 'token' or 'sequence'"):
        mean_kl(frozen(dist), dist, per="batch")  # type: ignore[arg-type]  # the fault
    with pytest.raises(
        TrustRegionError, match=r"per is 'sequence', and the batch has shape \(4,\)"
    ):
        mean_kl(frozen(dist), dist, per="sequence")


@pytest.mark.parametrize("order", [1, 2])
def test_actions_masked_out_of_a_categorical_bring_no_nan(order: int) -> None:
    torch.manual_seed(0)
    x = torch.randn(SAMPLES, 6, dtype=torch.float64, requires_grad=True)
    old = frozen(td.Categorical(logits=without_some(x)))
    assert (old.probs == 0).any()

    def kl(y: Tensor) -> Tensor:
        return mean_kl(old, td.Categorical(logits=without_some(y)))

    moved = (x.detach() + 0.1 * torch.randn_like(x)).requires_grad_()
    compared = torch.autograd.gradcheck if order == 1 else torch.autograd.gradgradcheck
    assert compared(kl, [moved])


def test_an_action_newly_masked_out_is_infinitely_far() -> None:
    old = td.Categorical(logits=torch.zeros(2, 3))
    new = td.Categorical(logits=torch.tensor([[0.0, 0.0, -math.inf], [0.0, 0.0, 0.0]]))
    assert mean_kl(old, new).item() == math.inf
    assert mean_kl(new, old).item() == pytest.approx(math.log(1.5) / 2)


@pytest.mark.parametrize("logit", [0.0, 5.0, 16.0, 30.0, 80.0, -16.0, -80.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_probabilities_that_round_to_0_or_1_bring_no_infinity(
    logit: float, dtype: torch.dtype
) -> None:
    logits = torch.full((4,), logit)
    pairs = [
        (td.Bernoulli(logits=each), td.Bernoulli(logits=each + 1.5))
        for each in (logits.to(dtype), logits.double())
    ]
    coarse, exact = (mean_kl(*each).item() for each in pairs)
    assert coarse == pytest.approx(exact, rel=3e-2 if dtype is torch.bfloat16 else 1e-4, abs=1e-30)
    five = [td.Binomial(5, logits=each.logits) for each in pairs[0]]
    assert mean_kl(five[0], five[1]).item() == pytest.approx(5 * coarse, rel=1e-2)
    for limit in (torch.inf, -torch.inf):
        certain = td.Bernoulli(logits=torch.full((4,), limit))
        assert mean_kl(certain, td.Bernoulli(logits=torch.full((4,), limit))).item() == 0


def test_a_family_that_torch_transforms_keeps_its_own_kl() -> None:
    old, new = td.Gumbel(one(4), one(4)), td.Gumbel(one(4), 2 * one(4))
    kl = kl_divergence(old, new).mean().double()
    torch.testing.assert_close(mean_kl(frozen(old), new), kl)


class Halved(TanhTransform):
    """A transform of the user's own, equal to itself alone."""

    def __eq__(self, other: object) -> bool:
        """Compare by identity."""
        return self is other

    __hash__ = TanhTransform.__hash__


def test_transforms_without_tensors_may_compare_by_identity_or_be_inverted() -> None:
    for transform in (Halved(), td.transforms.SigmoidTransform().inv):
        old, new = (
            td.TransformedDistribution(td.Normal(shift * one(4), 1.0), [transform])
            for shift in (0.0, 0.1)
        )
        assert mean_kl(frozen(old), new).item() == pytest.approx(0.005)
        assert frozen(old).log_prob(0.5 * one(4)).isfinite().all()


def test_values_that_torch_derives_are_not_held_against_the_policy() -> None:
    half = td.Categorical(logits=torch.randn(64, 6).half(), validate_args=False)
    assert half.probs.dtype is torch.half  # computed, and summing to 1 but roughly
    frozen(half)
    for dist in (td.Uniform(one(4), 2 * one(4)), Bare(one(4))):
        frozen(dist)


class Bare(Distribution):
    """A distribution that declares nothing."""

    def __init__(self, loc: Tensor) -> None:
        self.loc = loc
        super().__init__(loc.shape, validate_args=False)


@pytest.mark.parametrize("make", [td.Categorical, td.OneHotCategorical])
def test_what_the_new_policy_rules_out_makes_the_kl_infinite(make: Any) -> None:
    old = make(torch.tensor([[0.3, 0.3, 0.4]]))
    without = make(torch.tensor([[0.5, 0.5, 0.0]]))
    assert mean_kl(old, without).isinf()
    expected = 0.5 * math.log(0.5 / 0.3) * 2
    assert mean_kl(without, old).item() == pytest.approx(expected, rel=1e-6)


def test_small_probabilities_count_as_they_are() -> None:
    small = 1e-9  # torch's logits are those of 1.2e-7
    old, new = torch.tensor([[0.3, 0.7]]), torch.tensor([[small, 1 - small]])
    expected = 0.3 * math.log(0.3 / small) + 0.7 * math.log(0.7)
    assert mean_kl(td.Categorical(old), td.Categorical(new)).item() == pytest.approx(expected)
    event = mean_kl(td.Bernoulli(old[:, 0]), td.Bernoulli(new[:, 0])).item()
    assert event == pytest.approx(expected)
    never = td.Bernoulli(torch.zeros(1))
    assert mean_kl(td.Bernoulli(old[:, 0]), never).isinf()
    assert mean_kl(never, td.Bernoulli(old[:, 0])).item() == pytest.approx(-math.log(0.7))


@pytest.mark.filterwarnings("ignore:Singular sample")  # torch draws again
def test_every_wishart_of_a_batch_has_its_own_kl() -> None:
    torch.manual_seed(0)
    factors = torch.eye(2).double() * torch.tensor([1.0, 2.0]).double()[:, None, None]
    old = td.Wishart(torch.tensor([8.0, 9.0]).double(), scale_tril=factors)
    new = td.Wishart(torch.tensor([8.5, 9.2]).double(), scale_tril=1.1 * factors)
    actions = old.sample((1000 * min(problems(), 100),))
    ratios = old.log_prob(actions) - new.log_prob(actions)
    error = (4 * ratios.std(0) / len(ratios) ** 0.5).max().item()
    torch.testing.assert_close(joint_kl(old, new), ratios.mean(0), rtol=0, atol=error)


@pytest.mark.parametrize(
    "make",
    [
        lambda moved: td.Uniform(-moved, moved),
        lambda moved: td.Pareto(moved, torch.ones(3)),
    ],
    ids=["Uniform", "Pareto"],
)
def test_no_trust_region_exists_where_the_support_moves(make: Callable[[Tensor], Any]) -> None:
    moved = torch.ones(3, requires_grad=True)
    with pytest.raises(TrustRegionError, match=r"moves the support.*no trust region exists"):
        mean_kl(make(torch.ones(3)), make(moved))
    with pytest.raises(TrustRegionError, match=r"moves the support.*no trust region exists"):
        mean_kl(make(torch.ones(3)), make(1.1 * moved.detach()))
