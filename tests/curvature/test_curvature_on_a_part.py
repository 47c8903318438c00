"""Curvature from a closure of its own, on a part of the batch."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from micro_batches import UNEVEN, lengths, on_rows
from problems import Problem, gaussian
from torch.distributions import kl_divergence

from trpo_optim import TrustRegionError


def test_curvature_comes_from_its_own_closure_and_all_else_from_the_other() -> None:
    problem = gaussian()
    part = on_rows(problem, slice(0, 6))
    settings = {"cg_iterations": 200, "cg_tolerance": 1e-12, "damping": 0.1}
    start = problem.vector()
    gradient = problem.dense_gradient()
    fisher = Problem(problem.policy, problem.observations[:6]).dense_fisher()
    report = problem.optimizer(**settings).step(problem.closure, curvature=part)
    direction = torch.linalg.solve(fisher + 0.1 * torch.eye(len(start)).double(), -gradient)
    step = problem.vector() - start
    assert report.accepted
    torch.testing.assert_close(step / step.norm(), direction / direction.norm())
    loss, kl = problem.closure()
    assert (report.loss_after, report.kl) == (loss.item(), kl.item())


def test_the_loss_of_the_curvature_closure_is_not_used() -> None:
    steps = []
    for spoiled in (False, True):
        problem = gaussian()
        part = on_rows(problem, slice(0, 6), third=True)

        def curvature(part: Callable[[], Any] = part, spoiled: bool = spoiled) -> Any:
            loss, kl, dist = part()
            return loss.detach() * torch.nan if spoiled else loss, kl, dist

        report = problem.optimizer().step(problem.closure, curvature=curvature)
        assert (report.accepted, report.engine) == (True, "Gauss-Newton")
        steps.append(problem.vector())
    assert torch.equal(*steps)


def test_a_part_that_promises_too_small_a_kl_costs_one_further_trial() -> None:
    problem = gaussian()
    part = on_rows(problem, slice(0, 4), third=True)
    optimizer = problem.optimizer(max_kl=1e-4, damping=1e-2)
    report = optimizer.step(problem.closure_with_dist, curvature=part)
    assert report.accepted
    assert report.kl > 2 * report.predicted_kl
    assert report.backtracks == 1
    assert 0.9e-4 <= report.kl <= 1e-4


def test_the_part_is_evaluated_once_however_many_products() -> None:
    problem = gaussian()
    part, calls = on_rows(problem, slice(0, 48)), []  # its KL is near that of the batch

    def curvature() -> Any:
        calls.append(1)
        return part()

    report = problem.proven_optimizer(cg_tolerance=0.0).step(problem.closure, curvature=curvature)
    assert report.fisher_products == 10
    assert len(calls) == 1
    assert report.closure_evaluations == 3 + report.backtracks


def test_curvature_on_a_part_goes_with_micro_batches() -> None:
    whole, parts = gaussian(), gaussian()
    whole.optimizer().step(whole.closure, curvature=on_rows(whole, slice(0, 6)))
    parts.optimizer().step(
        [on_rows(parts, chunk) for chunk in UNEVEN],
        weights=lengths(UNEVEN),
        curvature=on_rows(parts, slice(0, 6)),
    )
    torch.testing.assert_close(parts.vector(), whole.vector(), rtol=0, atol=1e-12)


def test_vanilla_has_no_use_for_curvature() -> None:
    problem = gaussian()
    report = problem.optimizer(mode="vanilla").step(problem.closure, curvature=lambda: 1 / 0)  # type: ignore[arg-type, return-value]
    assert report.accepted


def test_a_curvature_closure_with_another_old_policy_is_refused() -> None:
    problem, other = gaussian(0), gaussian(1)

    def curvature() -> Any:
        loss, _ = problem.closure()
        return loss, kl_divergence(other.old, problem.policy(problem.observations)).mean()

    with pytest.raises(TrustRegionError, match=r"In curvature: .* not about zero"):
        problem.optimizer().step(problem.closure, curvature=curvature)
