"""Times of jobs that take turns in one process, so that a drifting machine tilts no ratio."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
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


@dataclass(frozen=True)
class Times:
    """Seconds of the runs of one job."""

    seconds: list[float]

    @property
    def median(self) -> float:
        """The median, in seconds."""
        return statistics.median(self.seconds)

    def over(self, other: Times) -> str:
        """Return the ratio of the medians, and the quartiles of the rounds' own ratios."""
        ratios = [ours / theirs for ours, theirs in zip(self.seconds, other.seconds, strict=True)]
        low, _, high = statistics.quantiles(ratios, n=4)
        return f"{self.median / other.median:.2f} ({low:.2f} to {high:.2f})"


def taken_in_turn(jobs: Mapping[str, Job], rounds: int, device: str = "cpu") -> dict[str, Times]:
    """Time jobs round by round, each once a round, after one round that warms up.

    Args:
        jobs: By name.
        rounds: Timed rounds.
        device: Waited for before the clock is read, unless it is the CPU.

    Returns:
        The times by the same names.
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
    return {name: Times(each) for name, each in seconds.items()}


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
