"""Transforms made anew in every forward: the same if their type and constants are."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributions as td
from pairs import one
from torch import Tensor, nn
from torch.distributions import Distribution, constraints
from torch.distributions.transforms import (
    AffineTransform,
    CatTransform,
    ComposeTransform,
    CumulativeDistributionTransform,
    ExpTransform,
    IndependentTransform,
    ReshapeTransform,
    StackTransform,
    TanhTransform,
    Transform,
)

from trpo_optim import TrustRegionError, frozen, log_prob, mean_kl
from trpo_optim.distributions.constants import alike, learned


class Stretched(Transform):
    """A transform of the user's own, without ``__eq__``, made by any function."""

    domain = codomain = constraints.real
    bijective, sign = True, 1

    def __init__(self, stretch: Any) -> None:
        super().__init__()
        self.stretch = stretch

    def _call(self, x: Tensor) -> Tensor:
        return multiplied(self.stretch(x), 1.0)


class Scaled(TanhTransform):
    """A tanh with a factor, which torch's ``__eq__`` does not look at."""

    def __init__(self, factor: Any) -> None:
        super().__init__()
        self.factor = factor


def times(factor: Any) -> Callable[[Tensor], Tensor]:
    return lambda x: factor * x


def multiplied(x: Tensor, by: float) -> Tensor:
    return by * x


def linear(weight: float, *, trained: bool = False) -> nn.Module:
    layer = nn.Linear(1, 1, bias=False).requires_grad_(trained)
    nn.init.constant_(layer.weight, weight)
    return layer


def squashed(transform: Transform, shift: float = 0.0) -> Distribution:
    base = td.Independent(td.Normal(torch.full((4, 6), shift), 1.0), 1)
    return td.TransformedDistribution(base, [transform])


CONSTANT: dict[str, Callable[[], Transform]] = {
    "independent tanh": lambda: IndependentTransform(TanhTransform(), 1),
    "a range for each dimension": lambda: IndependentTransform(
        AffineTransform(torch.zeros(6), torch.arange(1.0, 7.0)), 1
    ),
    "concatenated": lambda: CatTransform([TanhTransform(), ExpTransform()], dim=-1, lengths=[2, 4]),
    "stacked": lambda: StackTransform(3 * [TanhTransform(), ExpTransform()], dim=-1),
    "reshaped": lambda: ReshapeTransform(torch.Size([6]), torch.Size([2, 3])),
    "composed": lambda: ComposeTransform(
        [IndependentTransform(each, 1) for each in (TanhTransform(cache_size=1), ExpTransform())]
    ),
    "a distribution function": lambda: CumulativeDistributionTransform(
        td.Categorical(torch.ones(6))
    ),
    "inverted": lambda: IndependentTransform(AffineTransform(one(6), 2 * one(6)), 1).inv,
    "one's own": lambda: Stretched(times(2.0)),
    "one's own of a tensor": lambda: Stretched(times(torch.tensor([2.0, 3.0]))),
    "one's own of a partial": lambda: Stretched(functools.partial(multiplied, by=2.0)),
    "one's own of a frozen module": lambda: Stretched(linear(2.0)),
    "a subclass": lambda: Scaled(2.0),
}


@pytest.mark.parametrize("name", CONSTANT)
def test_constant_transforms_made_anew_leave_the_kl_of_the_bases(name: str) -> None:
    make = CONSTANT[name]
    old, new = squashed(make()), squashed(make(), 0.1)
    assert mean_kl(old, new).item() == pytest.approx(6 * 0.1**2 / 2, rel=1e-5)
    assert mean_kl(frozen(old), new).item() == pytest.approx(6 * 0.1**2 / 2, rel=1e-5)


DIFFERENT: dict[str, tuple[Transform, Transform]] = {
    "another type": (
        IndependentTransform(TanhTransform(), 1),
        IndependentTransform(ExpTransform(), 1),
    ),
    "another number": (Stretched(times(2.0)), Stretched(times(3.0))),
    "another number in a subclass": (Scaled(2.0), Scaled(3.0)),
    "another tensor": (Scaled(one(2)), Scaled(2 * one(2))),
    "another shape": (Scaled(one(2)), Scaled(one(1, 2))),
    "other lengths": (
        CatTransform([TanhTransform(), ExpTransform()], dim=-1, lengths=[2, 4]),
        CatTransform([TanhTransform(), ExpTransform()], dim=-1, lengths=[4, 2]),
    ),
    "another order": (
        ComposeTransform([TanhTransform(), ExpTransform()]),
        ComposeTransform([ExpTransform(), TanhTransform()]),
    ),
    "another function": (Stretched(torch.sinh), Stretched(torch.tan)),
    "another frozen module": (Stretched(linear(2.0)), Stretched(linear(3.0))),
    "another attribute": (Stretched({"a": 1}), Stretched({"b": 1})),
    "learned": (Scaled(one()), Scaled(one().requires_grad_())),
    "learned in a function": (Stretched(times(one())), Stretched(times(one().requires_grad_()))),
    "learned in a module": (Stretched(linear(2.0)), Stretched(linear(2.0, trained=True))),
    "learned in a method": (
        Stretched(linear(2.0).forward),
        Stretched(linear(2.0, trained=True).forward),
    ),
}


@pytest.mark.parametrize("name", DIFFERENT)
def test_transforms_that_differ_or_are_learned_are_refused(name: str) -> None:
    ours, theirs = DIFFERENT[name]
    base = td.Normal(torch.zeros(4), 1.0)
    old, new = (td.TransformedDistribution(base, [each]) for each in (ours, theirs))
    with pytest.raises(TrustRegionError, match=r"different or learned transforms.*sampled_kl"):
        mean_kl(old, new)


@pytest.mark.parametrize(
    "make",
    [
        lambda: AffineTransform(one(6), 2 * one(6)).inv,
        lambda: ComposeTransform([AffineTransform(one(6), 2 * one(6)).inv, TanhTransform()]),
    ],
    ids=["alone", "composed"],
)
def test_a_frozen_copy_keeps_what_an_inverted_transform_inverts(make: Any) -> None:
    base = td.Normal(torch.zeros(4, 6), 1.0)
    dist = td.Independent(td.TransformedDistribution(base, [make()]), 1)
    actions = dist.sample()
    torch.testing.assert_close(log_prob(frozen(dist), actions), dist.log_prob(actions))


def test_what_refers_to_itself_ends() -> None:
    ours, theirs = Stretched(None), Stretched(None)
    ours.stretch, theirs.stretch = [ours], [theirs]
    assert alike(ours, theirs)
    assert not learned(ours)
