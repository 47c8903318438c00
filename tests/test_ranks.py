"""One step over several processes: the same as over one, and the same on each."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
import torch.distributed as dist
from problems import Problem, gaussian
from ranks import on_ranks, values_of
from torch import Tensor
from torch.distributions import kl_divergence

from trpo_optim import StepReport

SAMPLES = 96
STEPS = 20

Cut = list[list[int]]
"""For every rank the sizes of its closures' batches, one after the other."""

CUTS: dict[str, Cut] = {
    "1": [[96]],
    "2 even": [[48], [48]],
    "2 uneven": [[90], [6]],
    "3 even": [[32], [32], [32]],
    "3, one with none": [[60], [], [36]],
    "3, one of weight 0": [[60], [0], [36]],
    "4 even": [[24], [24], [24], [24]],
    "4 uneven": [[1], [50], [40], [5]],
    "2 in micro-batches": [[20, 30], [40, 6]],
    "3 in micro-batches, unlike": [[20, 30, 6], [40], []],
}


def problem(dtype: torch.dtype) -> Problem:
    """Return what every rank builds; a step is 7 % of the parameters' length."""
    return gaussian(dtype=dtype, samples=SAMPLES, hidden=32)


def trained(
    group: Any, rank: int, cut: Cut, dtype: torch.dtype, *, third: bool, settings: dict[str, Any]
) -> tuple[Tensor, list[StepReport]]:
    """Take steps on batches of which this rank has its share."""
    task = problem(dtype)
    optimizer = task.optimizer(process_group=group, **settings)
    reports = []
    for step in range(STEPS):
        torch.manual_seed(step)
        observations = torch.randn(SAMPLES, 4, dtype=dtype)
        noise, advantages = torch.randn(SAMPLES, 2, dtype=dtype), torch.randn(SAMPLES, dtype=dtype)
        sizes = cut[rank]
        start = sum(sum(each) for each in cut[:rank])
        closures = []
        for size in sizes:
            rows = slice(start, start + size)
            closures.append(on_rows(task, observations[rows], noise[rows], advantages[rows], third))
            start += size
        reports.append(optimizer.step(closures, weights=sizes))
    return task.vector(), reports


def on_rows(
    task: Problem, observations: Tensor, noise: Tensor, advantages: Tensor, third: bool
) -> Any:
    """Return the closure of some rows; without any it cannot be called."""
    if not len(observations):
        return min
    with torch.no_grad():
        old = task.policy(observations)
        actions = old.base_dist.loc + old.base_dist.scale * noise
        old_log_prob = old.log_prob(actions)

    def closure() -> Any:
        dist_ = task.policy(observations)
        ratio = (dist_.log_prob(actions) - old_log_prob).exp()
        pair = -(ratio * advantages).mean(), kl_divergence(old, dist_).mean()
        return (*pair, dist_) if third else pair

    return closure


VARIANTS = [
    *itertools.product(["trpo"], (torch.float32, torch.float64), (False, True)),
    ("natural", torch.float32, True),
    ("natural", torch.float64, False),
    ("vanilla", torch.float32, False),
    ("vanilla", torch.float64, True),
]
TOLERANCE = {torch.float32: 1e-5, torch.float64: 1e-12}


def all_variants(rank: int, cut: Cut) -> list[tuple[Tensor, list[StepReport]]]:
    """Train in all modes and both precisions, with and without the third value."""
    group = dist.group.WORLD if dist.is_initialized() else None
    found = []
    for mode, dtype, third in VARIANTS:
        settings = {"mode": mode, **({"lr": 0.1} if mode == "vanilla" else {})}
        found.append(trained(group, rank, cut, dtype, third=third, settings=settings))
    return found


@pytest.mark.parametrize("cut", CUTS.values(), ids=CUTS)
def test_steps_are_those_of_one_process(cut: Cut) -> None:
    alone = all_variants(0, [[SAMPLES]])
    found = values_of(on_ranks(len(cut), all_variants, cut))
    for (_, dtype, _), (expected, reports), *ranks in zip(VARIANTS, alone, *found, strict=True):
        for vector, theirs in ranks:
            assert float((vector - expected).norm() / expected.norm()) < TOLERANCE[dtype]
            assert torch.equal(vector, ranks[0][0])
            assert theirs == ranks[0][1]
        assert [each.outcome for each in ranks[0][1]] == [each.outcome for each in reports]
