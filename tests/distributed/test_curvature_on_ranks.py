"""What ranks make of products on a part of their samples."""

from __future__ import annotations

import pytest
import torch.distributed as dist
from micro_batches import on_rows
from problems import Problem, gaussian
from ranks import on_ranks, values_of

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


@pytest.mark.parametrize("parts", [(slice(0, 4), slice(4, 8)), (None, slice(0, 4))])
def test_products_are_doubted_by_the_kl_that_they_are_taken_of(
    parts: tuple[slice | None, ...],
) -> None:
    for first, *later in values_of(on_ranks(2, stepped, parts)):
        assert min(apart for _, apart in later) > 1.75  # the solve fits few rows
        assert first[0] > 5  # to compare
        # Two local models, a trial, and the KL of the parts: beyond the radius and at the end.
        assert [evaluations for evaluations, _ in later] == [5] * 3
