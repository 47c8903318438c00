"""Differences on one side: what they cost, when they serve, and when they are left."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from problems import Problem
from test_dear_products import Convolved, dear, kinked
from test_finite_differences import MATRIX, slope_of
from torch import Tensor
from torch.distributions import Categorical, kl_divergence

from trpo_optim.algorithm.finite_differences import FiniteDifferences, UnresolvedError
from trpo_optim.curvature.engine_choice import learned


def counted(slope: Any) -> tuple[Any, list[float]]:
    """Return a slope that notes the lengths it is asked for."""
    lengths: list[float] = []

    def noting(vector: Tensor, length: float) -> tuple[float, Tensor]:
        lengths.append(length)
        result: tuple[float, Tensor] = slope(vector, length)
        return result

    return noting, lengths


def test_one_side_costs_one_evaluation_for_the_first_product_too() -> None:
    slope, lengths = counted(slope_of(cubic=1.0))
    differences = FiniteDifferences(slope, 2e-16, one_sided=True)
    for vector in torch.eye(3, dtype=torch.float64)[:2]:
        product = differences.product(vector)
        torch.testing.assert_close(product, MATRIX @ vector, rtol=0, atol=2e-4)
    assert len(lengths) == 2
    assert min(lengths) > 0


@pytest.mark.parametrize(("cubic", "offset", "balanced"), [(1.0, 0.0, True), (1.0, 0.1, False)])
def test_both_sides_say_whether_one_of_them_serves(
    cubic: float, offset: float, balanced: bool
) -> None:
    def slope(vector: Tensor, length: float) -> tuple[float, Tensor]:
        kl, gradient = slope_of(cubic)(vector, length)
        return kl, gradient + offset

    differences = FiniteDifferences(slope, 2e-16)
    assert not differences.balanced
    differences.product(torch.ones(3, dtype=torch.float64))
    assert differences.balanced is balanced


def test_one_side_that_is_flat_is_said() -> None:
    def slope(vector: Tensor, length: float) -> tuple[float, Tensor]:
        return 0.0, torch.zeros_like(vector)

    with pytest.raises(UnresolvedError):
        FiniteDifferences(slope, 2e-16, one_sided=True).product(torch.ones(3))


def test_a_further_step_costs_one_gradient_per_product_one_before_and_one_per_trial() -> None:
    problem = dear(Convolved, torch.float64)
    optimizer = problem.optimizer()
    for step in range(2):
        problem = Problem(problem.policy, problem.observations, step)
        report = optimizer.step(problem.closure_with_dist)
        assert report.engine == "finite differences"
    assert report.closure_evaluations == 1 + report.fisher_products + report.backtracks + 1


@pytest.mark.parametrize(
    ("engine", "used"),
    [("auto", "Gauss-Newton"), ("finite differences", "finite differences")],
)
def test_one_side_is_left_where_products_are_no_longer_symmetric(engine: Any, used: str) -> None:
    problem = dear(Convolved)
    layer: Any = problem.policy.network
    optimizer = problem.optimizer(engine=engine)
    optimizer.step(problem.closure_with_dist)
    choice = learned(optimizer.param_groups[0])["parts"]
    assert choice["one_sided"] is True
    layer.activation = kinked(1e-5)
    problem = Problem(problem.policy, problem.observations, 1)
    assert optimizer.step(problem.closure_with_dist).engine == used
    assert not choice["one_sided"]


@pytest.mark.parametrize("engine", ["auto", "finite differences"])
def test_a_solve_of_one_product_looks_at_both_sides(engine: Any) -> None:
    """Nothing compares a single product, and the KL's gradient may not be zero."""
    problem = dear(Convolved)
    optimizer = problem.optimizer(engine=engine, cg_iterations=1, mode="natural")
    optimizer.step(problem.closure_with_dist)
    problem = Problem(problem.policy, problem.observations, 1)
    old = Categorical(logits=problem.policy(problem.observations).logits.detach() + 0.01)
    old = Categorical(logits=old.logits + 0.01 * torch.randn(60, 3))

    def drifted() -> Any:
        loss, _, dist = problem.closure_with_dist()
        return loss, kl_divergence(old, dist).mean(), dist

    report = optimizer.step(drifted)
    assert report.predicted_kl == pytest.approx(0.01)
    assert report.kl == pytest.approx(0.01, rel=0.3)
    assert not learned(optimizer.param_groups[0])["parts"]["one_sided"]
