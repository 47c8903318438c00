"""A study of settings: each candidate learns the tasks of the search for half of their steps.

    make bench-settings

Killed at any moment, the same command makes only the runs that are missing. Finished runs are lines
of docs/results/settings.jsonl.xz. At the end, it fills the tables of docs/results/settings.md.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import archived_runs
import learning
import page
import pandas as pd
import train
import tyro
from archived_runs import Line
from checkpoint import comparable
from learning_report import IQM, better, number, with_interval
from scores import Finals, frame
from table import records
from tasks import RANDOM, SEARCH, TASKS, shorter_traces

EARLIER = "earlier settings"

CANDIDATES: dict[str, Callable[[train.Args], train.Args]] = {
    "shorter traces": shorter_traces,
    "one λ": lambda args: replace(shorter_traces(args), gae_lambda=args.gae_lambda),
    "one λ, one batch for the critic": lambda args: replace(
        shorter_traces(args),
        gae_lambda=args.gae_lambda,
        critic_batches=1,
        critic_epochs=args.critic_epochs * args.critic_batches,
    ),
}
"""By name, what each makes of the earlier settings of a task."""
RETIRED = (
    EARLIER,
    "reuse of one batch, half weight",
    "16 environments",
    "256 units",
    "shorter steps by small advantages",
    "λ = 0.9",
    "less noise",
    "least noise",
    "twice the radius",
    "beta policy",
    "critic by trust-region steps",
    "critic of 256 units",
    "tanh-squashed actions",
    "16 environments, staggered",
    "shortest traces",
    "long traces",
)
"""Those with runs of which the example no longer has the options, the floor or the targets."""
SEEDS = range(100, 104)
"""Seeds that no other run has."""
ARCHIVE = Path("docs/results/settings.jsonl.xz")
PAGE = Path("docs/results/settings.md")
GROUPS = {"most of MuJoCo": "Hopper-v5", "Swimmer": "Swimmer-v5", "classic control": "CartPole-v1"}
"""The groups of tasks with settings of their own, and a task of each."""


def case(env_id: str, name: str, seed: int) -> Line:
    """Return a run of the study, half as long as the benchmark's: 512 000 steps on MuJoCo."""
    args = replace(TASKS[env_id].args, env_id=env_id, seed=seed)
    lengths = ("total_steps", "anneal_start", "anneal_steps")
    half: dict[str, Any] = {each: 512 * (getattr(args, each) or 0) // 1000 for each in lengths}
    args = CANDIDATES[name](replace(args, **half))
    settings = comparable(args) | {"total_steps": args.total_steps, "pieces": 1}
    return {"environment": env_id, "algorithm": name, "seed": seed, "settings": settings}


def cases() -> list[Line]:
    """Return all runs of the study, seed by seed."""
    return [case(each, name, seed) for seed in SEEDS for name in CANDIDATES for each in SEARCH]


def chosen() -> str:
    """Return the table of the settings of trpo that are not the example's defaults."""
    groups = {name: learning.case(each, "trpo", 0)["settings"] for name, each in GROUPS.items()}
    return records(
        {"setting": f"`{setting}`", **{name: each[setting] for name, each in groups.items()}}
        for setting, default in comparable(train.Args()).items()
        if setting != "env_id" and any(each[setting] != default for each in groups.values())
    )


def candidates(evaluations: pd.DataFrame) -> str:
    """Return the table of the candidates that have runs."""
    finals, rows = Finals(evaluations), []
    for name in (*RETIRED, *CANDIDATES):
        env_ids = finals.common(name, EARLIER, among=SEARCH)
        made = evaluations[evaluations["algorithm"] == name]
        pair = [finals.returns(each, env_ids) for each in (name, EARLIER)]
        row = {
            "candidate": name,
            "runs": len(made),
            **{env_id: number(finals.mean(env_id, name)) for env_id in SEARCH},
            "IQM": with_interval(IQM, finals.normalised(name, env_ids)),
            "IQM, earlier settings": f"{IQM(finals.normalised(EARLIER, env_ids)):.2f}",
            "improvement": with_interval(better, *pair) if name != EARLIER else "–",
            "CPU s of a run": f"{made['cpu'].mean():.0f}",
        }
        rows += [row] if len(made) else []
    return records(rows)


def main(workers: int = 2, report: bool = False) -> None:
    """Make the runs that are missing, and fill the tables.

    Args:
        workers: Runs side by side.
        report: Fill the tables of the finished runs, and run nothing.
    """
    if not report:
        archived_runs.make(ARCHIVE, cases(), learning.play, learning.DEFAULTS, workers)
    floors = [case for case in learning.cases() if case["algorithm"] == RANDOM]
    made = archived_runs.finished(ARCHIVE, cases(), learning.DEFAULTS)
    made += [[line] for line in archived_runs.lines_of(ARCHIVE) if line["algorithm"] in RETIRED]
    evaluations = frame([*made, *archived_runs.finished(learning.ARCHIVE, floors)])
    page.fill(PAGE, settings=chosen(), candidates=candidates(evaluations))


if __name__ == "__main__":
    tyro.cli(main)
