"""Closures on rows of a batch."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from problems import Problem
from torch.distributions import kl_divergence


def on_rows(problem: Problem, rows: slice, *, third: bool = False) -> Callable[[], Any]:
    """Return the closure of a part of the batch."""
    with torch.no_grad():
        old = problem.policy(problem.observations[rows])

    def closure() -> Any:
        dist = problem.policy(problem.observations[rows])
        ratio = (dist.log_prob(problem.actions[rows]) - problem.old_log_prob[rows]).exp()
        pair = -(ratio * problem.advantages[rows]).mean(), kl_divergence(old, dist).mean()
        return (*pair, dist) if third else pair

    return closure


UNEVEN = [slice(0, 8), slice(8, 31), slice(31, 32), slice(32, 64)]


def lengths(chunks: Sequence[slice]) -> list[int]:
    return [chunk.stop - chunk.start for chunk in chunks]
