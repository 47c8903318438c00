"""Finished runs by task and algorithm, and their scores: 0 for random actions, 1 for the target."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence
from statistics import fmean

import numpy as np
from jobs import RANDOM
from numpy.typing import NDArray
from results import Line
from tasks import TASKS

Array = NDArray[np.float64]


class Runs:
    """All evaluations by task and algorithm.

    Args:
        lines: One for each evaluation.
    """

    def __init__(self, lines: Iterable[Line]) -> None:
        runs: dict[tuple[str, str], dict[int, list[Line]]] = defaultdict(lambda: defaultdict(list))
        for line in lines:
            runs[line["environment"], line["algorithm"]][line["seed"]].append(line)
        self.runs = runs

    def final(self, env_id: str, algorithm: str, kind: str = "deterministic") -> Array:
        """Return the final policy's mean return, one number a seed."""
        runs = self.runs.get((env_id, algorithm), {})
        return np.array([fmean(run[-1][kind]) for run in runs.values()])

    def mean(self, env_id: str, algorithm: str, kind: str = "deterministic") -> float | None:
        """Return the mean over the seeds; None without runs."""
        returns = self.final(env_id, algorithm, kind)
        return float(returns.mean()) if len(returns) else None

    def curves(self, env_id: str, algorithm: str) -> tuple[Array, Array]:
        """Return steps, (P,), and every seed's mean returns, (S, P)."""
        runs = [*self.runs[env_id, algorithm].values()]
        returns = [[fmean(line["deterministic"]) for line in run] for run in runs]
        return np.array([line["steps"] for line in runs[0]]), np.array(returns)

    def common(self, *algorithms: str, among: Iterable[str] = TASKS) -> list[str]:
        """Return the tasks that all of these algorithms have runs of."""
        return [
            env_id for env_id in among if all((env_id, each) in self.runs for each in algorithms)
        ]

    def returns(self, algorithm: str, env_ids: Sequence[str], kind: str = "deterministic") -> Array:
        """Return final returns, (seeds, tasks)."""
        return _matrix([self.final(env_id, algorithm, kind) for env_id in env_ids])

    def normalised(self, algorithm: str, env_ids: Sequence[str]) -> Array:
        """Return scores, (seeds, tasks), on those of the tasks that have a target."""
        columns = []
        for env_id in self.common(RANDOM, among=env_ids):
            if (target := TASKS[env_id].target) is not None:
                floor = self.final(env_id, RANDOM).mean()
                columns.append((self.final(env_id, algorithm) - floor) / (target - floor))
        return _matrix(columns)

    def missed(self, algorithm: str) -> dict[str, float]:
        """Return the targets that the mean of an algorithm misses."""
        return {
            env_id: task.target
            for env_id, task in TASKS.items()
            if (mean := self.mean(env_id, algorithm)) is not None
            and task.target is not None
            and mean < task.target
        }


def _matrix(columns: list[Array]) -> Array:
    """Return columns side by side, as many rows as the shortest has."""
    seeds = min(map(len, columns), default=0)
    return np.array([column[:seeds] for column in columns]).T
