"""Gauss–Newton products in float32, where parts of a policy differ by orders of magnitude."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributions as td
from posed_policies import dense_hessian
from torch import Tensor, nn
from torch.distributions import Distribution
from torch.nn import functional

from trpo_optim import TrustRegionOptimizer, frozen, mean_kl
from trpo_optim.closure.evaluation import Objective
from trpo_optim.closure.parameters import ParameterVector
from trpo_optim.closure.transaction import Transaction
from trpo_optim.curvature.local_model import LocalModel
from trpo_optim.curvature.second_order import second_order

Make = Callable[[Tensor], Distribution]


def correlated(out: Tensor, smallest: float = 1e-3) -> td.MultivariateNormal:
    """Return Normals, the first narrow and the others with a correlation of 0.9."""
    covariance = torch.eye(3, dtype=torch.float64)
    covariance[0, 0] = smallest**2
    covariance[1, 2] = covariance[2, 1] = 0.9
    tril = torch.linalg.cholesky(covariance).to(out)
    scales = covariance.diagonal().sqrt().to(out)
    return td.MultivariateNormal(out[:, :3] * scales, scale_tril=tril)


def of_small_concentrations(out: Tensor) -> Distribution:
    """Return Dirichlets with two concentrations near 0.007 and two near 3."""
    return td.Dirichlet(functional.softplus(out + torch.tensor([-5.0, -5.0, 3.0, 3.0]).to(out)))


def betas_of_small_concentrations(out: Tensor) -> Distribution:
    return td.Independent(td.Beta((out[:, :2] - 5).exp(), (4 * out[:, 2:]).exp()), 1)


COUPLED: dict[str, Make] = {
    "correlated normals": correlated,
    "dirichlet": of_small_concentrations,
    "beta": betas_of_small_concentrations,
}
DIAGONAL: dict[str, Make] = {
    "normals of fixed scales": lambda out: td.Independent(
        td.Normal(out[:, :3], torch.tensor([1e-4, 1.0, 1e3]).to(out)), 1
    ),
    "multivariate normals": lambda out: td.MultivariateNormal(
        out[:, :3], scale_tril=torch.diag_embed(torch.tensor([1e-4, 1.0, 1e3]).to(out))
    ),
    "saturated bernoullis": lambda out: td.Independent(td.Bernoulli(logits=20 * out), 1),
    "exponentials": lambda out: td.Independent(td.Exponential((6 * out).exp()), 1),
}
EVERY = COUPLED | DIAGONAL


def modelled(make: Make, dtype: torch.dtype) -> tuple[LocalModel, nn.Module, Callable[[], Any]]:
    """Return the local model of a linear policy, the policy and its closure."""
    torch.manual_seed(0)
    policy = nn.Linear(4, 4).double().to(dtype)
    observations = torch.randn(64, 4, dtype=torch.float64).to(dtype)
    weights = torch.randn(64, 4, dtype=torch.float64).to(dtype)
    with torch.no_grad():
        old = frozen(make(policy(observations)))

    def closure() -> Any:
        out = policy(observations)
        dist = make(out)
        return (out * weights).mean(), mean_kl(old, dist), dist

    vector = ParameterVector(policy.parameters())
    with Transaction(vector) as transaction:
        return second_order(Objective(closure, vector, transaction)), policy, closure


@pytest.mark.parametrize("name", EVERY)
def test_products_equal_the_hessian_in_double_precision(name: str) -> None:
    make = EVERY[name]
    model, _, _ = modelled(make, torch.float32)
    assert (model.engine, model.fallback) == ("Gauss-Newton", "")
    found = torch.stack([model.product(row) for row in torch.eye(len(model.gradient))])
    _, policy, closure = modelled(make, torch.float64)
    exact = dense_hessian(closure, policy)
    sizes = exact.diagonal().sqrt()
    assert ((found - exact).abs() <= 1e-4 * sizes * sizes[:, None]).all()


@pytest.mark.parametrize("name", EVERY)
def test_only_a_coupled_matrix_needs_the_graph_of_the_kl_in_its_products(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, _, _ = modelled(EVERY[name], torch.float32)
    pulled: list[int] = []
    grad = torch.autograd.grad

    def counted(*args: Any, **options: Any) -> Any:
        pulled.append(1)
        return grad(*args, **options)

    monkeypatch.setattr(torch.autograd, "grad", counted)
    model.product(model.gradient)
    assert len(pulled) == (3 if name in COUPLED else 2)


def steps(dtype: torch.dtype) -> list[tuple[bool, float]]:
    """Return the outcomes of three steps of one optimizer; one scale is small after the first.

    Only the first step of an optimizer compares its product with finite differences.
    """
    torch.manual_seed(0)
    policy = nn.Linear(4, 3).double().to(dtype)
    optimizer = TrustRegionOptimizer(policy.parameters(), cg_iterations=30)
    taken = []
    for smallest in (1.0, 1e-3, 1e-3):
        report = optimizer.step(closure_of(policy, smallest, dtype))
        taken.append((report.accepted, report.improvement))
    return taken


def closure_of(policy: nn.Module, smallest: float, dtype: torch.dtype) -> Callable[[], Any]:
    """Return a closure whose batch is the same in every precision."""
    drawn = [torch.randn(256, width, dtype=torch.float64) for width in (4, 3, 1)]
    observations, noise, advantages = (each.to(dtype) for each in drawn)
    with torch.no_grad():
        old = correlated(policy(observations), smallest)
        actions = old.mean + (old.scale_tril @ noise[..., None])[..., 0]
        old, old_log_prob = frozen(old), old.log_prob(actions)

    def closure() -> Any:
        dist = correlated(policy(observations), smallest)
        ratio = (dist.log_prob(actions) - old_log_prob).exp()
        return -(ratio * advantages[:, 0]).mean(), mean_kl(old, dist), dist

    return closure


def test_steps_in_single_precision_improve_as_much_as_in_double_precision() -> None:
    single, double = steps(torch.float32), steps(torch.float64)
    assert all(accepted for accepted, _ in single)
    for (_, ours), (_, exact) in zip(single, double, strict=True):
        assert ours == pytest.approx(exact, rel=1e-2)
