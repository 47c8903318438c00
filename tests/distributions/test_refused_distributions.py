"""Distributions that have no KL, or one that is not plain, are refused by name."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
import torch.distributions as td
from families import positive
from pairs import mixture, one, plain
from torch.distributions import Distribution
from torch.distributions.transforms import AffineTransform

from trpo_optim import (
    TrustRegionError,
    entropy,
    frozen,
    log_prob,
    mean_kl,
    sampled_kl,
)


def learned_flow() -> Distribution:
    scale = torch.ones(2, requires_grad=True)
    return td.TransformedDistribution(
        td.Independent(td.Normal(one(3, 2), 1.0), 1), [AffineTransform(0.0, scale.exp(), 1)]
    )


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
    "other actions": (
        lambda: mean_kl(td.Categorical(logits=one(4, 3)), td.Categorical(logits=one(4, 1))),
        "old Categorical has 3 actions and the new one 1",
    ),
    "other actions of a part": (
        lambda: mean_kl(
            {"a": td.Categorical(logits=one(4, 3))}, {"a": td.Categorical(logits=one(4, 2))}
        ),
        r"Categorical\['a'\] has 3 actions and the new one 2",
    ),
    "an old policy with a graph": (
        lambda: mean_kl(
            td.Categorical(logits=torch.zeros(4, 3, requires_grad=True)), frozen(plain)
        ),
        "old policy requires grad.*first argument",
    ),
    "old log-probabilities with a graph": (
        lambda: sampled_kl(one(4).requires_grad_(), one(4)),
        "old log-probabilities require grad.*pass them first",
    ),
    "the same object": (lambda: mean_kl(plain, plain), "same object"),
    "a vector action that is not joint": (
        lambda: mean_kl(td.Normal(one(4, 2), 1.0), td.Normal(one(4, 2), 1.0)),
        r"batch shape \(4, 2\) and no event shape.*wrap it in Independent\(dist, 1\)",
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
    "no parts": (lambda: mean_kl((), ()), "an empty tuple or dict"),
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
        r"no closed form of the KL of MixtureSameFamily. Use sampled_kl.*register_kl",
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
        r"shape \(4, 1\), which would broadcast: Categorical needs shape \(4,\)",
    ),
    "log-probabilities of a vector action that is not joint": (
        lambda: log_prob(td.Normal(one(64, 2), 1.0), one(64, 2)),
        r"Normal has batch shape \(64, 2\) and no event.*Independent\(dist, 1\).*pass mask=",
    ),
    "log-probabilities of a part that is not joint": (
        lambda: log_prob({"a": (td.Bernoulli(one(4, 2) / 2),)}, {"a": (one(4, 2),)}),
        r"Bernoulli\['a'\]\[0\] has batch shape \(4, 2\) and no event shape",
    ),
    "log-probabilities with a mask of another shape": (
        lambda: log_prob(td.Normal(one(4, 2), 1.0), one(4, 2), torch.ones(3)),
        r"mask has shape \(3,\) and the batch \(4,\)",
    ),
    "a value beside the distribution": (
        lambda: frozen((plain, torch.zeros(4))),
        r"The policy is Tensor. It must be.*part \[1\] of what the policy returns: leave it out",
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
