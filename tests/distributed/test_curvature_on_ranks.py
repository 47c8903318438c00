"""What ranks make of products on a part of their samples."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist
from micro_batches import on_rows
from problems import Problem, gaussian
from ranks import on_ranks, values_of
from torch.distributions import kl_divergence

pytestmark = pytest.mark.ranks


def stepped(rank: int, parts: tuple[slice | None, ...]) -> list[tuple[int, float]]:
    """Take steps whose products are on some rows of each rank, or on all of them.

    Returns:
        For each step, the evaluations beside those of the line search, and KL over predicted KL.
    """
    start = gaussian()
    problem = Problem(start.policy, start.observations, rank)
    optimizer = problem.optimizer(max_kl=1e-4, damping=1e-2, process_group=dist.group.WORLD)
    found = []
    for step in range(4):
        part, rows = parts[rank], slice(0, len(problem.actions))
        curvature = None if part is None else on_rows(problem, part, third=True)
        report = optimizer.step([on_rows(problem, rows, third=True)], curvature=curvature)
        evaluations = report.closure_evaluations - report.backtracks
        found.append((evaluations, report.kl / report.predicted_kl))
        problem = Problem(problem.policy, problem.observations, 2 * step + rank + 1)
    return found


def test_products_are_doubted_by_the_kl_that_they_are_taken_of() -> None:
    few = slice(0, 4), slice(4, 8)
    for first, *later in values_of(on_ranks(2, stepped, few)):
        assert min(apart for _, apart in later) > 2  # the solve fits eight rows
        assert first[0] > 4  # to compare
        assert [evaluations for evaluations, _ in later] == [4] * 3


def test_products_on_all_rows_of_a_rank_are_doubted_by_the_kl_of_the_batch() -> None:
    for steps in values_of(on_ranks(2, stepped, (None, slice(0, 4)))):
        surprising = [not 1 / 1.75 < apart < 1.75 for _, apart in steps]
        compared = [evaluations > 3 for evaluations, _ in steps]
        assert compared[1:] == surprising[:-1]


def overshot(rank: int) -> tuple[list[int], float, float]:
    """Take a step whose first trial is far beyond the radius, on two closures a rank.

    Returns:
        How many closures each trial evaluated, the KL of this rank's rows, and the step's.
    """
    start, trials = gaussian(), list[int]()
    problem = Problem(start.policy, start.observations, rank)
    old = problem.policy(problem.observations)

    def noting(rows: slice) -> Any:
        closure = on_rows(problem, rows)

        def noted() -> Any:
            if not torch.is_grad_enabled():
                if rows.start == 0:
                    trials.append(0)
                trials[-1] += 1
            return closure()

        return noted

    parts = [noting(slice(0, 20)), noting(slice(20, 64))]
    optimizer = problem.optimizer(max_kl=0.05, damping=1e-2, process_group=dist.group.WORLD)
    part = on_rows(problem, slice(0, 4), third=True)
    report = optimizer.step(parts, weights=[20, 44], curvature=part)
    kl = kl_divergence(old, problem.policy(problem.observations)).mean()
    return trials, float(kl), report.kl


def test_a_trial_beyond_the_radius_ends_on_the_rank_that_is_beyond_it() -> None:
    ranks = values_of(on_ranks(2, overshot))
    kls = [kl for _, kl, _ in ranks]
    for trials, _, taken in ranks:
        assert trials[0] == 1
        assert trials[-1] == 2
        assert taken == pytest.approx(sum(kls) / 2, rel=1e-9)
        assert taken <= 0.05
