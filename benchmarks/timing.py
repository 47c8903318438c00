"""Times of jobs that take turns in one process, so that a drifting machine tilts no ratio."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from operator import truediv
from statistics import median, quantiles
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class Job:
    """What is timed, and what is done before each run, untimed."""

    run: Callable[[], object]
    prepare: Callable[[], object] = lambda: None

    def repeat(self) -> Any:
        """Prepare, run, and return what the run returned."""
        self.prepare()
        return self.run()


def taken_in_turn(
    jobs: Mapping[str, Job], rounds: int, device: str = "cpu"
) -> dict[str, list[float]]:
    """Return the seconds of jobs, each run once a round, after one round that warms up.

    Before the clock is read, a device other than the CPU is waited for.
    """
    seconds: dict[str, list[float]] = {name: [] for name in jobs}
    for turn in range(rounds + 1):
        for name, job in jobs.items():
            job.prepare()
            _wait(device)
            start = time.perf_counter()
            job.run()
            _wait(device)
            if turn:
                seconds[name].append(time.perf_counter() - start)
    return seconds


def over(ours: Sequence[float], theirs: Sequence[float]) -> str:
    """Return the ratio of the medians, and the quartiles of the rounds' own ratios."""
    low, _, high = quantiles(map(truediv, ours, theirs), n=4)
    return f"{median(ours) / median(theirs):.2f} ({low:.2f} to {high:.2f})"


def putting_back(parameters: Sequence[Tensor]) -> Callable[[], None]:
    """Return what writes the present values of parameters into them again."""
    start = [parameter.detach().clone() for parameter in parameters]

    @torch.no_grad()
    def put_back() -> None:
        for parameter, value in zip(parameters, start, strict=True):
            parameter.copy_(value)

    return put_back


def _wait(device: str) -> None:
    if device != "cpu":
        torch.get_device_module(device).synchronize()
