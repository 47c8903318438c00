"""Gauss–Newton products against dense Hessians and closed forms, for every kind of third value."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
import torch.distributions as td
from families import SMOOTH, Make, positive
from memory import peak_bytes
from networks import SAMPLES
from problems import gaussian
from torch import Tensor, nn
from torch.distributions import Distribution, kl_divergence

from trpo_optim import TrustRegionOptimizer
from trpo_optim.closure.evaluation import Objective
from trpo_optim.closure.parameters import ParameterVector
from trpo_optim.closure.transaction import Transaction
from trpo_optim.curvature.local_model import LocalModel, second_order


class Policy(nn.Module):
    """A small network and three free parameters, which ``make`` turns into a distribution."""

    def __init__(self, make: Make) -> None:
        super().__init__()
        self.network = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 6))
        self.free = nn.Parameter(torch.tensor([-0.3, 0.1, 0.2]))
        self.make = make

    def forward(self, observation: Tensor) -> Distribution:
        return self.make(self.network(observation), self.free)


Third = Callable[[Any], Any]
Divergence = Callable[[Any, Any], Tensor]
Reduce = Callable[[Tensor], Tensor]


def masked(kl: Tensor) -> Tensor:
    mask = (torch.arange(len(kl)) % 3 > 0).to(kl)
    return (kl.reshape(len(kl), -1).sum(1) * mask).sum() / mask.sum()


def posed(
    make: Make,
    third: Third | None = lambda dist: dist,
    *,
    reduce: Reduce = Tensor.mean,
    divergence: Divergence = kl_divergence,
    dtype: torch.dtype = torch.float64,
) -> tuple[Policy, Callable[[], Any]]:
    """Return a policy with a distribution of that kind, and its closure."""
    torch.manual_seed(0)
    policy = Policy(make).to(dtype)
    observations = torch.randn(SAMPLES, 4, dtype=dtype)
    with torch.no_grad():
        old = policy(observations)
        actions = old.sample()
        old_log_prob = old.log_prob(actions)
        advantages = torch.randn_like(old_log_prob)

    def closure() -> Any:
        dist = policy(observations)
        ratio = (dist.log_prob(actions) - old_log_prob).exp()
        pair = -(ratio * advantages).mean(), reduce(divergence(old, dist))
        return pair if third is None else (*pair, third(dist))

    return policy, closure


@contextmanager
def linearized(
    make: Make, third: Third | None = lambda dist: dist, **options: Any
) -> Iterator[tuple[LocalModel, Policy, Callable[[], Any]]]:
    """Yield the local model, the policy and its closure."""
    policy, closure = posed(make, third, **options)
    vector = ParameterVector(policy.parameters())
    with Transaction(vector) as transaction:
        yield second_order(Objective(closure, vector, transaction)), policy, closure


def dense(model: LocalModel) -> Tensor:
    return torch.stack([model.product(row) for row in torch.eye(len(model.gradient)).double()])


def dense_hessian(closure: Callable[[], Any], policy: nn.Module) -> Tensor:
    """Return the Hessian of the KL, row by row, by plain double backward."""
    parameters = list(policy.parameters())
    slopes = torch.autograd.grad(
        closure()[1], parameters, create_graph=True, materialize_grads=True
    )
    rows = [
        torch.autograd.grad(entry, parameters, retain_graph=True, materialize_grads=True)
        if entry.requires_grad
        else [torch.zeros_like(each) for each in parameters]
        for entry in torch.cat([slope.reshape(-1) for slope in slopes])
    ]
    return torch.stack([torch.cat([each.reshape(-1) for each in row]) for row in rows])


@pytest.mark.parametrize("reduce", [Tensor.mean, masked], ids=["mean", "masked"])
@pytest.mark.parametrize("name", SMOOTH)
def test_products_equal_the_dense_hessian(name: str, reduce: Reduce) -> None:
    with linearized(SMOOTH[name], reduce=reduce) as (model, policy, closure):
        assert (model.engine, model.fallback) == ("Gauss-Newton", "")
        torch.testing.assert_close(dense(model), dense_hessian(closure, policy), rtol=0, atol=1e-10)


@pytest.mark.parametrize("name", SMOOTH)
def test_the_gradient_is_that_of_the_loss(name: str) -> None:
    with linearized(SMOOTH[name]) as (model, _, _):
        with_third = model.gradient
    with linearized(SMOOTH[name], None) as (model, _, _):
        torch.testing.assert_close(with_third, model.gradient, rtol=0, atol=1e-12)


LAPLACE: dict[str, Make] = {
    "own scale": lambda x, free: td.Laplace(x[:, :3], positive(x[:, 3:])),
    "free scale": lambda x, free: td.Independent(td.Laplace(x[:, :3], free.exp()), 1),
    "fixed scale": lambda x, free: td.Laplace(x[:, :3] + free, torch.full_like(x[:, :3], 0.7)),
}


@pytest.mark.parametrize("reduce", [Tensor.mean, masked], ids=["mean", "masked"])
@pytest.mark.parametrize("name", LAPLACE)
def test_a_laplace_policy_has_its_exact_fisher_matrix(name: str, reduce: Reduce) -> None:
    """A Laplace's Fisher matrix is 1/b² in location and in scale, where autograd sees a kink."""
    with linearized(LAPLACE[name], reduce=reduce) as (model, policy, _):
        assert model.engine == "Gauss-Newton"
        product = dense(model)
        torch.manual_seed(0)
        nn.Linear(4, 5), nn.Linear(5, 6)
        observations = torch.randn(SAMPLES, 4, dtype=torch.float64)
        dist = policy(observations)
        base = dist.base_dist if isinstance(dist, td.Independent) else dist
        weights = torch.zeros(SAMPLES, 3, dtype=torch.float64, requires_grad=True)
        joint = weights.sum(1) if isinstance(dist, td.Independent) else weights
        (weights,) = torch.autograd.grad(reduce(joint), weights)
        oracle = torch.zeros_like(product)
        for coordinate in (base.loc, base.scale):
            if coordinate.requires_grad:
                jacobian = torch.stack([rows(entry, policy) for entry in coordinate.reshape(-1)])
                fisher = (weights / base.scale.square()).detach().reshape(-1, 1)
                oracle += jacobian.T @ (fisher * jacobian)
    torch.testing.assert_close(product, oracle, rtol=0, atol=1e-12)


def rows(entry: Tensor, policy: nn.Module) -> Tensor:
    parameters = list(policy.parameters())
    slopes = torch.autograd.grad(entry, parameters, retain_graph=True, materialize_grads=True)
    return torch.cat([each.reshape(-1) for each in slopes])


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


def test_a_loss_that_goes_past_the_distribution_keeps_its_gradient() -> None:
    problem = gaussian()

    def closure(third: bool) -> Any:
        dist = problem.policy(problem.observations)
        loss, kl = problem.values(dist)
        loss = loss + problem.parameters()[0].square().sum()
        return (loss, kl, dist) if third else (loss, kl)

    vector = ParameterVector(problem.parameters())
    models = []
    for third in (True, False):
        with Transaction(vector) as transaction:
            models.append(second_order(Objective(lambda: closure(third), vector, transaction)))  # noqa: B023 (called at once)
    assert [model.engine for model in models] == ["Gauss-Newton", "torch.func"]
    torch.testing.assert_close(models[0].gradient, models[1].gradient, rtol=0, atol=1e-14)


def test_parameters_of_other_optimizers_do_not_hinder() -> None:
    problem = gaussian()
    policy = problem.policy

    def closure() -> Any:
        dist = policy(problem.observations)
        return *problem.values(dist), dist.base_dist.loc

    optimizer = TrustRegionOptimizer(policy.get_submodule("network.2").parameters())
    assert optimizer.step(closure).engine == "Gauss-Newton"


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.float64, 1e-10)])
@pytest.mark.parametrize("name", SMOOTH)
def test_a_step_is_the_same_with_the_third_value_and_without(
    name: str, dtype: torch.dtype, tolerance: float
) -> None:
    ends = []
    for third in (True, False):
        policy, closure = posed(SMOOTH[name], (lambda dist: dist) if third else None, dtype=dtype)
        report = TrustRegionOptimizer(policy.parameters()).step(closure)
        assert report.accepted
        assert report.engine == ("Gauss-Newton" if third else "torch.func")
        ends.append(torch.cat([each.detach().reshape(-1) for each in policy.parameters()]))
    torch.testing.assert_close(ends[0], ends[1], rtol=0, atol=tolerance)


@pytest.mark.parametrize("third", [lambda dist: dist, None], ids=["gauss-newton", "hessian"])
def test_many_categories_need_little_more_memory_than_a_gradient(third: Third | None) -> None:
    torch.manual_seed(0)
    network = nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 4000))
    observations = torch.randn(128, 8)
    with torch.no_grad():
        old = td.Categorical(logits=network(observations))
        actions = old.sample()
        old_log_prob, _ = old.log_prob(actions), old.probs

    def closure() -> Any:
        dist = td.Categorical(logits=network(observations))
        loss = -(dist.log_prob(actions) - old_log_prob).exp().mean()
        pair = loss, kl_divergence(old, dist).mean()
        return pair if third is None else (*pair, third(dist))

    parameters = list(network.parameters())
    vector = ParameterVector(parameters)
    gradient = peak_bytes(lambda: torch.autograd.grad(closure()[0], parameters))
    with Transaction(vector) as transaction:
        objective = Objective(closure, vector, transaction)

        def product() -> Tensor:
            model = second_order(objective)
            return model.product(model.gradient)

        assert peak_bytes(product) <= 2.5 * gradient


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
    models = []
    for third in (True, False):
        objective = Objective(functools.partial(closure, third), vector, Transaction(vector))
        models.append(second_order(objective))
    fits = name != "a normal whose mean goes into a categorical"
    assert [model.engine == "Gauss-Newton" for model in models] == [fits, False]
    torch.testing.assert_close(models[0].gradient, models[1].gradient, rtol=0, atol=1e-13)
    torch.testing.assert_close(dense(models[0]), dense(models[1]), rtol=0, atol=1e-12)


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
