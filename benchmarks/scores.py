"""Learning runs as a data frame, and their scores: 0 for random actions and 1 for the target."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from statistics import fmean

import numpy as np
import pandas as pd
from archived_runs import Line
from numpy.typing import NDArray
from tasks import RANDOM, TASKS

Array = NDArray[np.float64]
RUN = ["algorithm", "environment", "seed"]
KINDS = ["deterministic", "sampled"]


def frame(runs: Iterable[Sequence[Line]]) -> pd.DataFrame:
    """Return a row for each evaluation, with its mean return of either kind.

    Raises:
        ValueError: If a return is not finite.
    """
    columns = [*RUN, "steps", *KINDS, "cpu"]
    rows = [{**line, **{k: fmean(line[k]) for k in KINDS}} for run in runs for line in run]
    evaluations = pd.DataFrame(rows, columns=columns)
    if not np.isfinite(evaluations[KINDS].to_numpy(float)).all():
        raise ValueError("A return is not finite. Find its run before you compare means.")
    return evaluations


class Finals:
    """The returns of final policies, of evaluations as ``frame`` returns them."""

    def __init__(self, evaluations: pd.DataFrame) -> None:
        self.rows = evaluations.sort_values("steps").groupby(RUN).last()

    def common(self, *algorithms: str, among: Iterable[str] = TASKS) -> list[str]:
        """Return the tasks that all of these algorithms have runs of."""
        pairs = set(self.rows.index.droplevel("seed"))
        return [env_id for env_id in among if all((each, env_id) in pairs for each in algorithms)]

    def returns(self, algorithm: str, env_ids: Sequence[str], kind: str = "deterministic") -> Array:
        """Return final returns, (seeds, tasks), of the seeds that all the tasks have."""
        if not self.common(algorithm, among=env_ids):
            return np.empty((0, len(env_ids)))
        table = self.rows.loc[algorithm, kind].unstack("environment")
        returns: Array = table.reindex(columns=list(env_ids)).dropna().to_numpy()
        return returns

    def mean(self, env_id: str, algorithm: str, kind: str = "deterministic") -> float | None:
        """Return the mean over the seeds; None without runs."""
        returns = self.returns(algorithm, [env_id], kind)
        return float(returns.mean()) if len(returns) else None

    def normalised(self, algorithm: str, env_ids: Sequence[str]) -> Array:
        """Return scores, (seeds, tasks), on those of the tasks that have a target."""
        targets = {each: TASKS[each].target for each in self.common(RANDOM, among=env_ids)}
        scored = [env_id for env_id, target in targets.items() if target is not None]
        floor = np.array([self.mean(each, RANDOM) for each in scored])
        target = np.array([targets[each] for each in scored])
        scores: Array = (self.returns(algorithm, scored) - floor) / (target - floor)
        return scores
