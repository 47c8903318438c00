"""KL, log-probability, entropy and copies of policy distributions, and what they refuse."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributions as td
from families import FAMILIES, Family, positive, without_some
from networks import SAMPLES
from torch import Tensor, nn
from torch.distributions import Distribution, kl_divergence
from torch.distributions.transforms import AffineTransform, ComposeTransform, TanhTransform

from trpo_optim import (
    TrustRegionError,
    TrustRegionOptimizer,
    entropy,
    frozen,
    log_prob,
    mean_kl,
    sampled_kl,
)

CLOSED = [name for name, family in FAMILIES.items() if not family.sampled]


def pair(family: Family) -> tuple[Any, Any]:
    """Return two policies of a family, some way apart, in double precision."""
    torch.manual_seed(0)
    x, free = torch.randn(SAMPLES, 6).double(), torch.randn(3).double()
    away = 0.3 * torch.randn(SAMPLES, 6)
    return family.make(x, free), family.make(x + away, free + 0.1)


def parts(dist: Any) -> list[Distribution]:
    if isinstance(dist, Distribution):
        return [dist]
    return list(dist.values() if isinstance(dist, dict) else dist)


@pytest.mark.parametrize("name", CLOSED)
def test_the_kl_is_the_mean_log_ratio_of_many_samples(name: str) -> None:
    family = FAMILIES[name]
    old, new = pair(family)
    torch.manual_seed(1)
    draws = 40_000
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
    torch.testing.assert_close(mean_kl(frozen(old), new), kl_divergence(old, new).mean())


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


def test_a_ratio_that_overflows_leaves_the_plain_sampled_kl_a_number() -> None:
    assert sampled_kl(torch.tensor([-100.0, 0.0]), torch.tensor([0.0, -1.0])).item() == -49.5


def mixture(x: Tensor) -> Distribution:
    return td.MixtureSameFamily(td.Categorical(logits=x[:, :2]), td.Normal(x[:, 2:4], 1.0))


def test_the_sampled_kls_are_without_bias_and_one_is_never_negative() -> None:
    torch.manual_seed(0)
    old = td.Normal(torch.zeros(2_000_000), 1.0)
    new = td.Normal(torch.full((2_000_000,), 0.1), 1.1)
    actions = old.sample()
    ours = [old.log_prob(actions), new.log_prob(actions)]
    exact = kl_divergence(old, new).mean().item()
    ratios = ours[1] - ours[0]
    for low_variance, each in ((False, -ratios), (True, ratios.exp() - 1 - ratios)):
        estimate = sampled_kl(*ours, low_variance=low_variance).item()
        assert estimate == pytest.approx(exact, abs=4 * each.std().item() / math.sqrt(2e6))
    few = [each[:30].view(10, 3) for each in ours]
    plain = [sampled_kl(a, b).item() for a, b in zip(*few, strict=True)]
    other = [sampled_kl(a, b, low_variance=True).item() for a, b in zip(*few, strict=True)]
    assert min(plain) < 0 < min(other)


def test_the_low_variance_estimator_has_a_tenth_of_the_plain_ones_deviation() -> None:
    torch.manual_seed(0)
    old = td.Independent(td.Normal(torch.zeros(200, 2048, 6), 1.0), 1)
    new = td.Independent(td.Normal(torch.full((200, 2048, 6), (0.02 / 6) ** 0.5), 1.0), 1)
    assert mean_kl(old, new).item() == pytest.approx(0.01)
    actions = old.sample()
    logs = list(zip(old.log_prob(actions), new.log_prob(actions), strict=True))
    plain = torch.stack([sampled_kl(*each) for each in logs]).std().item()
    other = torch.stack([sampled_kl(*each, low_variance=True) for each in logs]).std().item()
    assert plain == pytest.approx((2 * 0.01 / 2048) ** 0.5, rel=0.2)
    assert other / plain == pytest.approx(0.1, abs=0.03)


@pytest.mark.parametrize("low_variance", [False, True])
def test_the_sampled_kl_curves_as_the_score_does(low_variance: bool) -> None:
    torch.manual_seed(0)
    x = torch.randn(SAMPLES, 4, dtype=torch.float64)
    with torch.no_grad():
        actions = mixture(x).sample()
        old = mixture(x).log_prob(actions)

    def kl(y: Tensor) -> Tensor:
        new = mixture(y).log_prob(actions)
        return sampled_kl(old, new, low_variance=low_variance)

    scores = torch.autograd.functional.jacobian(lambda y: mixture(y).log_prob(actions), x)
    flat = scores.reshape(SAMPLES, -1)
    hessian = torch.autograd.functional.hessian(kl, x).reshape(4 * SAMPLES, -1)
    torch.testing.assert_close(hessian, flat.T @ flat / SAMPLES)
    torch.testing.assert_close(
        torch.autograd.functional.jacobian(kl, x), torch.zeros_like(x), rtol=0, atol=1e-16
    )


def test_a_mask_leaves_padding_out_of_the_sampled_kl() -> None:
    old, new = torch.tensor([0.1, -math.inf, 0.3]), torch.tensor([0.2, -math.inf, 0.1])
    new.requires_grad_()
    mask = torch.tensor([True, False, True])
    value = sampled_kl(old, new, mask)
    assert value.item() == pytest.approx(0.05)
    (slope,) = torch.autograd.grad(value, new)
    torch.testing.assert_close(slope, (torch.tensor([0.1, 0.0, -0.2]).exp() - 1) / 2)


def test_a_step_on_the_plain_sampled_kl_stays_within_the_radius_that_it_measures() -> None:
    torch.manual_seed(0)
    layer = nn.Linear(3, 4)
    observations = torch.randn(2000, 3)
    with torch.no_grad():
        actions = mixture(layer(observations)).sample()
        old = mixture(layer(observations)).log_prob(actions)
    advantages = torch.randn(2000)

    def closure() -> tuple[Tensor, Tensor, Tensor]:
        new = mixture(layer(observations)).log_prob(actions)
        return -((new - old).exp() * advantages).mean(), sampled_kl(old, new), new

    report = TrustRegionOptimizer(layer.parameters()).step(closure)
    assert (report.accepted, report.engine) == (True, "Gauss-Newton")
    assert report.kl <= 0.01
    with torch.no_grad():
        new = mixture(layer(observations)).log_prob(actions)
    assert (old - new).mean().item() == pytest.approx(report.kl, rel=1e-4)


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


def one(*shape: int) -> Tensor:
    return torch.ones(shape)


def learned_flow() -> Distribution:
    scale = torch.ones(2, requires_grad=True)
    return td.TransformedDistribution(
        td.Independent(td.Normal(one(3, 2), 1.0), 1), [AffineTransform(0.0, scale.exp(), 1)]
    )


plain = td.Categorical(logits=torch.zeros(4, 3))
REFUSED: dict[str, tuple[Callable[[], object], str]] = {
    "other family": (
        lambda: mean_kl(td.Normal(one(4), 1.0), td.Laplace(one(4), 1.0)),
        "old policy is Normal and the new one Laplace",
    ),
    "other inner family": (
        lambda: mean_kl(
            td.Independent(td.Normal(one(4, 2), 1.0), 1),
            td.Independent(td.Laplace(one(4, 2), 1.0), 1),
        ),
        "old policy is Normal and the new one Laplace",
    ),
    "other shape": (
        lambda: mean_kl(td.Normal(one(4), 1.0), td.Normal(one(5), 1.0)),
        r"batch shape \(4,\) and event shape \(\), the new one \(5,\)",
    ),
    "an old policy with a graph": (
        lambda: mean_kl(
            td.Categorical(logits=torch.zeros(4, 3, requires_grad=True)), frozen(plain)
        ),
        "old policy carries a graph.*first argument",
    ),
    "old log-probabilities with a graph": (
        lambda: sampled_kl(one(4).requires_grad_(), one(4)),
        "old log-probabilities carry a graph.*pass them first",
    ),
    "the same object": (lambda: mean_kl(plain, plain), "same object"),
    "a vector action that is not joint": (
        lambda: mean_kl(td.Normal(one(4, 2), 1.0), td.Normal(one(4, 2), 1.0)),
        r"batch shape \(4, 2\) and no event shape.*Wrap it in Independent\(dist, 1\)",
    ),
    "a distribution beside a tuple": (
        lambda: mean_kl(plain, (plain,)),
        "old policy is Categorical and the new one a tuple of 1",
    ),
    "other keys": (
        lambda: mean_kl({"a": plain}, {"b": plain}),
        r"a dict of \['a'\] and the new policy a dict of \['b'\]",
    ),
    "a part of another family": (
        lambda: mean_kl({"a": (plain,)}, {"a": (td.Poisson(one(4)),)}),
        r"old policy\['a'\]\[0\] is Categorical and the new one Poisson",
    ),
    "parts of several batch shapes": (
        lambda: mean_kl((plain, td.Poisson(one(5))), (frozen(plain), td.Poisson(one(5)))),
        r"batch shapes \[\(4,\), \(5,\)\]",
    ),
    "no parts": (lambda: mean_kl((), ()), "no parts"),
    "a mask of another shape": (
        lambda: mean_kl(plain, frozen(plain), torch.ones(5)),
        r"mask has shape \(5,\) and the batch \(4,\)",
    ),
    "a mask of too many dimensions": (
        lambda: mean_kl(plain, frozen(plain), torch.ones(4, 3)),
        r"mask has 2 dimensions, and Categorical has batch shape \(4,\)",
    ),
    "a mask that is all false": (
        lambda: mean_kl(plain, frozen(plain), torch.zeros(4)),
        "all false",
    ),
    "a mask of numbers": (
        lambda: mean_kl(plain, frozen(plain), torch.full((4,), 0.5)),
        "values other than 0 and 1",
    ),
    "no closed form": (
        lambda: mean_kl(mixture(one(4, 4)), mixture(one(4, 4))),
        r"KL of MixtureSameFamily has no closed form. Use sampled_kl",
    ),
    "a learned transform": (
        lambda: mean_kl(frozen(learned_flow()), learned_flow()),
        "different or learned transforms.*sampled_kl",
    ),
    "a family made of learned transforms": (
        lambda: mean_kl(td.Weibull(one(4), one(4)), td.Weibull(one(4).requires_grad_(), one(4))),
        "new Weibull have different or learned transforms.*sampled_kl",
    ),
    "other transforms": (
        lambda: mean_kl(
            td.TransformedDistribution(td.Normal(one(4), 1.0), [AffineTransform(0.0, 2.0)]),
            td.TransformedDistribution(td.Normal(one(4), 1.0), [AffineTransform(0.0, 3.0)]),
        ),
        "different or learned transforms",
    ),
    "other total counts": (
        lambda: mean_kl(td.Binomial(5, one(4) / 2), td.Binomial(4, one(4) / 2)),
        "different total counts",
    ),
    "NaN logits": (
        lambda: frozen(td.Categorical(logits=one(4, 3) * torch.nan, validate_args=False)),
        r"Categorical has logits outside .* \(such as nan\)",
    ),
    "NaN logits of the old policy": (
        lambda: mean_kl(td.Categorical(logits=one(4, 3) * torch.nan, validate_args=False), plain),
        "Categorical has (probs|logits) outside .*nan",
    ),
    "a scale of zero": (
        lambda: frozen(td.Independent(td.Normal(one(4, 2), 0 * one(4, 2), validate_args=False), 1)),
        r"Normal has scale outside .* \(such as 0\)",
    ),
    "a negative scale": (
        lambda: frozen((plain, td.Laplace(one(4), -one(4), validate_args=False))),
        r"Laplace has scale outside .* \(such as -1\)",
    ),
    "log-probabilities of several shapes": (
        lambda: sampled_kl(one(4), one(4, 2)),
        r"shape \(4,\) and the new ones \(4, 2\)",
    ),
    "too few parts of an action": (
        lambda: log_prob((plain, plain), one(4, 3)),
        "a tuple of 2 and the action a tuple of 3",
    ),
    "actions that would broadcast": (
        lambda: log_prob({"a": plain}, {"a": torch.zeros(4, 1)}),
        r"shape \(4, 1\), and one for each of Categorical has \(4,\)",
    ),
    "no distribution": (lambda: frozen((plain, None)), "The policy is NoneType. It must be"),
    "no closed form of the entropy": (
        lambda: entropy(mixture(one(4, 4))),
        "entropy of MixtureSameFamily has no closed form",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_makes_no_sense_is_refused_by_name(name: str) -> None:
    call, message = REFUSED[name]
    with pytest.raises(TrustRegionError, match=message):
        call()


def test_an_action_outside_the_support_is_refused_by_name() -> None:
    dist = td.Independent(td.Beta(positive(one(4, 2)), positive(one(4, 2))), 1)
    with pytest.raises(ValueError, match=r"within the support .*Beta"):
        log_prob({"wheel": dist}, {"wheel": 2 * one(4, 2)})


def test_numbers_of_the_new_policy_do_not_raise() -> None:
    bad = td.Categorical(logits=one(4, 3) * torch.nan, validate_args=False)
    assert math.isnan(mean_kl(plain, bad).item())
