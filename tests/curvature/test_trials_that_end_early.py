"""Trials of several closures, which end once their KL is beyond the radius."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from micro_batches import UNEVEN, lengths, on_rows
from problems import Problem, gaussian
from torch.distributions import kl_divergence

FEW = slice(0, 4)
"""Rows whose products promise far smaller KLs than those of the batch."""


def counted(problem: Problem, trials: list[list[int]]) -> list[Any]:
    """Return the closures of parts of the batch, which note the trials that they are in."""

    def noting(index: int, rows: slice) -> Any:
        closure = on_rows(problem, rows)

        def noted() -> Any:
            if not torch.is_grad_enabled():
                if index == 0:
                    trials.append([])
                trials[-1].append(index)
            return closure()

        return noted

    return [noting(index, rows) for index, rows in enumerate(UNEVEN)]


@pytest.mark.parametrize("constraint", ["mean", "max"])
def test_a_trial_beyond_the_radius_evaluates_no_further_closures(constraint: Any) -> None:
    problem, trials = gaussian(), list[list[int]]()
    old = problem.policy(problem.observations)
    optimizer = problem.optimizer(max_kl=0.05, damping=1e-2, constraint=constraint)
    if constraint == "max":
        parts = [per_sample(problem, rows) for rows in UNEVEN]
    else:
        parts = counted(problem, trials)
    report = optimizer.step(
        parts, weights=lengths(UNEVEN), curvature=on_rows(problem, FEW, third=True)
    )
    kls = kl_divergence(old, problem.policy(problem.observations)).detach()
    assert report.accepted
    assert report.backtracks > 0
    assert report.kl == pytest.approx(float(kls.mean()), rel=1e-9)
    assert (kls.max() if constraint == "max" else kls.mean()) <= 0.05
    if constraint == "mean":
        assert len(trials) == report.backtracks + 1
        assert trials[0] == [0]
        assert trials[-1] == [0, 1, 2, 3]


def per_sample(problem: Problem, rows: slice) -> Any:
    with torch.no_grad():
        old = problem.policy(problem.observations[rows])
    closure = on_rows(problem, rows)

    def with_vector() -> Any:
        return closure()[0], kl_divergence(old, problem.policy(problem.observations[rows]))

    return with_vector


def test_what_a_trial_that_ended_early_reports_is_of_what_it_evaluated() -> None:
    problem, trials = gaussian(), list[list[int]]()
    parts = counted(problem, trials)
    optimizer = problem.optimizer(max_kl=0.05, damping=1e-2, max_backtracks=0)
    report = optimizer.step(
        parts, weights=lengths(UNEVEN), curvature=on_rows(problem, FEW, third=True)
    )
    assert report.outcome.name == "KL_ABOVE_RADIUS"
    assert trials == [[0]]
    assert report.trial_kl > 0.05


def test_a_natural_step_evaluates_all_closures() -> None:
    problem, trials = gaussian(), list[list[int]]()
    parts = counted(problem, trials)
    problem.optimizer(mode="natural", max_kl=0.05, damping=1e-2).step(
        parts, weights=lengths(UNEVEN), curvature=on_rows(problem, FEW, third=True)
    )
    assert trials == [[0, 1, 2, 3]]
