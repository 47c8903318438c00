"""What serves as the third value, and what falls back to the Hessian of the KL."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributions as td
from families import SMOOTH
from networks import SAMPLES
from posed_policies import (
    Divergence,
    Third,
    dense,
    dense_hessian,
    linearized,
)
from torch import Tensor, nn
from torch.distributions import Distribution, kl_divergence

from trpo_optim.closure.evaluation import Objective
from trpo_optim.closure.parameters import ParameterVector
from trpo_optim.closure.transaction import Transaction
from trpo_optim.curvature.second_order import second_order

TENSORS: dict[str, tuple[str, Third]] = {
    "location and scale": (
        "normal, own scale",
        lambda dist: (dist.loc, dist.scale),
    ),
    "a list of them": ("normal, joint", lambda dist: [dist.base_dist.loc, dist.base_dist.scale]),
    "a distribution in a tuple": ("categorical, logits", lambda dist: (dist,)),
    "normalised logits": ("categorical, logits", lambda dist: dist.logits),
    "probabilities": ("bernoulli, probabilities", lambda dist: dist.probs),
    "more than the KL needs": ("normal, joint", lambda dist: (dist, dist.entropy(), dist.mean)),
}


@pytest.mark.parametrize("name", TENSORS)
def test_bare_tensors_serve_as_well(name: str) -> None:
    family, third = TENSORS[name]
    with linearized(SMOOTH[family], third) as (model, policy, closure):
        assert (model.engine, model.fallback) == ("Gauss-Newton", "")
        torch.testing.assert_close(dense(model), dense_hessian(closure, policy), rtol=0, atol=1e-10)


def reverse(old: Distribution, new: Distribution) -> Tensor:
    return kl_divergence(new, old)


def by_probabilities(old: Any, new: Any) -> Tensor:
    return torch.sum(old.probs * (old.probs.log() - new.probs.log()), -1)


def of_mixtures(old: Any, new: Any) -> Tensor:
    """Return the KL of old against half old, half new: its slope is a KL's, its curvature not."""
    half = (old.logits.exp() + new.logits.exp()) / 2
    return torch.sum(old.probs * (old.logits - half.log()), -1)


def weighted_by_class(old: Any, new: Any) -> Tensor:
    weights = torch.arange(1, 7).to(old.probs)
    return torch.sum(weights * old.probs * (old.logits - new.logits), -1)


UNFIT: dict[str, tuple[str, Third, Divergence, str]] = {
    "one of two parameters": (
        "normal, own scale",
        lambda dist: dist.loc,
        kl_divergence,
        "other than through",
    ),
    "another evaluation's": (
        "normal, joint",
        lambda dist: td.Normal(dist.mean * 1.0, dist.stddev * 1.0),
        kl_divergence,
        "other than through",
    ),
    "what is not stationary": (
        "categorical, logits",
        lambda dist: dist.probs,
        by_probabilities,
        "not stationary",
    ),
    "a KL that is not of its form": (
        "categorical, logits",
        lambda dist: dist,
        of_mixtures,
        "not linear",
    ),
    "a KL of something else": (
        "categorical, logits",
        lambda dist: dist,
        weighted_by_class,
        "not that of the probabilities",
    ),
}


@pytest.mark.parametrize("name", UNFIT)
def test_what_does_not_serve_falls_back_to_the_hessian_and_says_so(name: str) -> None:
    family, third, divergence, reason = UNFIT[name]
    with linearized(SMOOTH[family], third, divergence=divergence) as (model, policy, closure):
        assert model.engine == "double backward"
        assert reason in model.fallback
        torch.testing.assert_close(dense(model), dense_hessian(closure, policy), rtol=0, atol=1e-10)


def test_a_reversed_kl_has_the_same_curvature() -> None:
    name = "categorical, logits"
    with linearized(SMOOTH[name], divergence=reverse) as (model, policy, closure):
        torch.testing.assert_close(dense(model), dense_hessian(closure, policy), rtol=0, atol=1e-10)


class Heads(nn.Module):
    """A network with two heads, of which the second may read the first."""

    def __init__(self) -> None:
        super().__init__()
        self.trunk = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3))
        self.head = nn.Linear(3, 3)


TWO: dict[str, Callable[[Tensor, nn.Module], list[Distribution]]] = {
    "autoregressive categoricals": lambda x, head: [
        td.Categorical(logits=x),
        td.Categorical(logits=head(x)),
    ],
    "a categorical and a normal that reads its logits": lambda x, head: [
        td.Categorical(logits=x),
        td.Independent(td.Normal(head(x), 0.5), 1),
    ],
    "the same logits twice": lambda x, head: [td.Categorical(logits=x), td.Categorical(logits=x)],
    "a normal whose mean goes into a categorical": lambda x, head: [
        td.Independent(td.Normal(x, 0.5), 1),
        td.Categorical(logits=head(x)),
    ],
    "two heads apart": lambda x, head: [
        td.Categorical(logits=x[:, :2]),
        td.Categorical(logits=x[:, 2:] * torch.arange(3).to(x)),
    ],
}


class Hybrid(Distribution):
    """Independent parts, kept in a list."""

    def __init__(self, parts: list[Distribution]) -> None:
        super().__init__(validate_args=False)
        self.parts = parts


@pytest.mark.parametrize("wrap", [tuple, Hybrid], ids=["tuple", "list attribute"])
@pytest.mark.parametrize("name", TWO)
def test_several_distributions_may_depend_on_one_another(
    name: str, wrap: Callable[[list[Distribution]], Any]
) -> None:
    torch.manual_seed(0)
    policy = Heads().double()
    observations = torch.randn(SAMPLES, 4).double()

    def parts() -> list[Distribution]:
        return TWO[name](policy.trunk(observations), policy.head)

    with torch.no_grad():
        old = parts()
        actions = [dist.sample() for dist in old]
        weights = torch.randn(SAMPLES).double()

    def closure(third: bool) -> Any:
        new = parts()
        pairs = list(zip(old, new, strict=True))
        log_prob = sum(dist.log_prob(a) for dist, a in zip(new, actions, strict=True))
        kl = torch.stack([kl_divergence(a, b).mean() for a, b in pairs]).sum()
        pair = -(torch.as_tensor(log_prob).exp() * weights).mean(), kl
        return (*pair, wrap(new)) if third else pair

    vector = ParameterVector(policy.parameters())
    models, matrices = [], []
    for third in (True, False):
        with Transaction(vector) as transaction:
            objective = Objective(functools.partial(closure, third), vector, transaction)
            models.append(second_order(objective))
            matrices.append(dense(models[-1]))
    fits = name != "a normal whose mean goes into a categorical"
    assert [model.engine == "Gauss-Newton" for model in models] == [fits, False]
    torch.testing.assert_close(models[0].gradient, models[1].gradient, rtol=0, atol=1e-13)
    torch.testing.assert_close(*matrices, rtol=0, atol=1e-12)


def of_the_mean_policy(old: Any, new: Any) -> Tensor:
    """Return the KL of Normals whose means are averaged over neighbouring rows: it couples rows."""
    pairs = [(dist.loc + dist.loc.roll(1, 0)) / 2 for dist in (old, new)]
    return kl_divergence(td.Normal(pairs[0], old.scale), td.Normal(pairs[1], new.scale))


def of_moment_matched(old: Any, new: Any) -> Tensor:
    """Return the KL of one Normal per row with the moments of the row's ensemble."""
    first, second = (
        td.Normal(dist.loc.mean(1), (dist.scale.square() + dist.loc.square()).mean(1).sqrt())
        for dist in (old, new)
    )
    return kl_divergence(first, second)


@pytest.mark.parametrize("divergence", [of_the_mean_policy, of_moment_matched])
def test_a_kl_that_couples_what_the_distribution_keeps_apart(divergence: Divergence) -> None:
    make = SMOOTH["normal, own scale"]
    with linearized(make, divergence=divergence) as (model, policy, closure):
        assert model.engine == "Gauss-Newton"
        torch.testing.assert_close(dense(model), dense_hessian(closure, policy), rtol=0, atol=1e-10)
