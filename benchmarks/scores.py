"""Finished learning runs by task and algorithm, and their scores against what is to be reached."""

from __future__ import annotations

from collections import defaultdict
from statistics import fmean
from typing import Any

import numpy as np
from jobs import SETTINGS
from numpy.typing import NDArray

Array = NDArray[np.float64]

ALGORITHMS = ("trpo", "sb3-contrib", "natural", "vanilla")

TARGETS = {
    "HalfCheetah-v5": (4500, "Tianshou 4471, best of the curve"),
    "Hopper-v5": (3400, "sb3-contrib 3372"),
    "Walker2d-v5": (4500, "sb3-contrib 4502"),
    "Ant-v5": (3600, "sb3-contrib 3554"),
    "Swimmer-v5": (359, "sb3-contrib 359"),
    "Humanoid-v5": (1030, "TRPO+ 1030"),
    "Reacher-v5": (-5, "Tianshou −5.1"),
    "InvertedPendulum-v5": (1000, "Tianshou 1000"),
    "InvertedDoublePendulum-v5": (9000, "Tianshou 8435"),
    "CartPole-v1": (500, "rl-zoo 500"),
    "Acrobot-v1": (-83, "rl-zoo −83"),
    "Pendulum-v1": (-175, "rl-zoo −175"),
    "MountainCarContinuous-v0": (92, "rl-zoo 92.5"),
    "LunarLander-v3": (133, "rl-zoo 133"),
}
"""What to reach, and whose published result it is near."""


class Runs:
    """All evaluations by task and algorithm.

    Args:
        lines: One for each evaluation.
    """

    def __init__(self, lines: list[dict[str, Any]]) -> None:
        runs: dict[tuple[str, str], dict[int, list[Any]]] = defaultdict(lambda: defaultdict(list))
        for line in lines:
            runs[line["environment"], line["algorithm"]][line["seed"]].append(line)
        self.runs = runs

    def final(self, env_id: str, algorithm: str, kind: str = "deterministic") -> Array:
        """Return the final policy's mean return, one number a seed."""
        runs = self.runs.get((env_id, algorithm), {})
        return np.array([fmean(run[-1][kind]) for run in runs.values()])

    def missed(self) -> dict[str, tuple[float, float | None]]:
        """Return trpo's mean and sb3-contrib's, if any, where trpo's is below the target."""
        missed = {}
        for env_id, (target, _) in TARGETS.items():
            own, peer = (self.final(env_id, algorithm) for algorithm in ("trpo", "sb3-contrib"))
            if len(own) and own.mean() < target:
                missed[env_id] = (float(own.mean()), float(peer.mean()) if len(peer) else None)
        return missed

    def curves(self, env_id: str, algorithm: str) -> tuple[Array, Array]:
        """Return steps, (P,), and every seed's mean returns, (S, P)."""
        runs = self.runs[env_id, algorithm].values()
        returns = [[fmean(line["deterministic"]) for line in run] for run in runs]
        return np.array([line["steps"] for line in next(iter(runs))]), np.array(returns)

    def common(self, *algorithms: str) -> list[str]:
        """Return the tasks that all of these algorithms have runs of."""
        return [
            env_id
            for env_id in SETTINGS
            if all(len(self.final(env_id, each)) for each in algorithms)
        ]

    def normalised(self, algorithm: str, env_ids: list[str], kind: str) -> Array:
        """Return scores, 0 for random actions and 1 for the target, (seeds, tasks).

        Of every task as many seeds as the one with the fewest has.
        """
        columns = []
        for env_id in env_ids:
            floor, scores = self.final(env_id, "random").mean(), self.final(env_id, algorithm, kind)
            columns.append((scores - floor) / (TARGETS[env_id][0] - floor))
        seeds = min(map(len, columns))
        return np.stack([column[:seeds] for column in columns], axis=1)

    def pairs(self, kind: str = "deterministic") -> dict[str, dict[str, Array]]:
        """Return normalised scores of TRPO and of each other algorithm, on the tasks of both."""
        found = {}
        for other in ALGORITHMS[1:]:
            if env_ids := self.common("trpo", other, "random"):
                names = ("trpo", other)
                found[other] = {name: self.normalised(name, env_ids, kind) for name in names}
        return found
