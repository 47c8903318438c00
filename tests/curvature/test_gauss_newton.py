"""Gauss–Newton products against dense Hessians and closed forms, for every kind of third value."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributions as td
from families import SMOOTH, Make, positive
from memory import peak_bytes
from networks import SAMPLES
from posed_policies import (
    Policy,
    Reduce,
    Third,
    dense,
    dense_hessian,
    linearized,
    masked,
    posed,
)
from problems import gaussian
from torch import Tensor, nn
from torch.distributions import kl_divergence

from trpo_optim import TrustRegionOptimizer
from trpo_optim.closure.evaluation import Objective
from trpo_optim.closure.parameters import ParameterVector
from trpo_optim.closure.transaction import Transaction
from trpo_optim.curvature.second_order import second_order

pytestmark = pytest.mark.no_cover

OF_EACH_KIND = {"normal, free scale", "squashed normal", "categorical, logits"}
OF_EACH_KIND |= {"categorical, many", "multivariate, scale"}
FEW = [
    pytest.param(name, marks=[pytest.mark.thorough] * (name not in OF_EACH_KIND)) for name in SMOOTH
]


@pytest.mark.parametrize("name", SMOOTH)
def test_products_equal_the_dense_hessian(name: str) -> None:
    require_the_dense_hessian(name, Tensor.mean)


@pytest.mark.parametrize("name", FEW)
def test_products_equal_the_dense_hessian_of_a_masked_mean(name: str) -> None:
    require_the_dense_hessian(name, masked)


def require_the_dense_hessian(name: str, reduce: Reduce) -> None:
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
        Policy(LAPLACE[name])
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


@pytest.mark.parametrize("name", SMOOTH)
def test_a_step_is_the_same_with_the_third_value_and_without(name: str) -> None:
    require_the_same_step(name, torch.float64, 1e-10)


@pytest.mark.parametrize("name", FEW)
def test_a_step_in_single_precision_is_the_same(name: str) -> None:
    require_the_same_step(name, torch.float32, 1e-5)


def require_the_same_step(name: str, dtype: torch.dtype, tolerance: float) -> None:
    ends = []
    for third in (True, False):
        policy, closure = posed(SMOOTH[name], (lambda dist: dist) if third else None, dtype=dtype)
        report = TrustRegionOptimizer(policy.parameters()).step(closure)
        assert report.accepted
        assert report.engine == ("Gauss-Newton" if third else "torch.func")
        ends.append(torch.cat([each.detach().reshape(-1) for each in policy.parameters()]))
    torch.testing.assert_close(ends[0], ends[1], rtol=0, atol=tolerance)


@pytest.mark.slow
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
