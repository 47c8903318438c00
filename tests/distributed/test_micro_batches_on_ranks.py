"""Ranks that have their samples in micro-batches, beside ranks that do not."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
from ranks import on_ranks, values_of
from test_ranks import CUTS, SAMPLES, Cut, problem, trained
from torch import Tensor

from trpo_optim import StepReport

pytestmark = [pytest.mark.ranks, pytest.mark.no_cover]


def in_micro_batches(rank: int, cut: Cut) -> tuple[Tensor, list[StepReport]]:
    """Train with the default engine."""
    task = problem(torch.float32, "cpu")
    return trained(task, dist.group.WORLD, rank, cut, steps=3, third=True, settings={})


def test_micro_batches_on_some_ranks_take_finite_differences_on_all() -> None:
    cut = CUTS["3 in micro-batches, unlike"]
    alone = trained(
        problem(torch.float32, "cpu"), None, 0, [[SAMPLES]], steps=3, third=True, settings={}
    )
    ranks = values_of(on_ranks(len(cut), in_micro_batches, cut))
    for vector, reports in ranks:
        assert torch.equal(vector, ranks[0][0])
        assert reports == ranks[0][1]
    for report, expected in zip(ranks[0][1], alone[1], strict=True):
        assert (report.engine, expected.engine) == ("finite differences", "Gauss-Newton")
        gain = report.improvement / report.kl**0.5
        assert gain == pytest.approx(expected.improvement / expected.kl**0.5, rel=0.01)
