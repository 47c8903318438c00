"""A study of settings: each candidate learns the tasks of the search for half of their steps.

    make bench-settings

Killed at any moment, the same command makes only the runs that are missing. Finished runs are lines
of docs/results/settings.jsonl.xz. At the end, it fills the tables of docs/results/settings.md.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from statistics import fmean
from typing import Any

import page
import train
import tyro
from checkpoint import comparable
from jobs import RANDOM, Job, gathered
from learning import ARCHIVE as RESULTS
from learning import job_of as run_of
from learning import play
from learning_report import BETTER, IQM, number, with_interval
from results import lines_of
from scores import Runs
from table import table
from tasks import SEARCH, TASKS

TODAY = "today"
CANDIDATES: dict[str, dict[str, Any]] = {
    TODAY: {},
    "reuse of one batch": {"reuse": 1},
}
"""By name, what each changes of the earlier settings."""
SEEDS = range(100, 104)
"""Seeds that no other run has."""
ARCHIVE, FOLDER = Path("docs/results/settings.jsonl.xz"), Path("runs/settings")
PAGE = Path("docs/results/settings.md")
GROUPS = {"most of MuJoCo": "Hopper-v5", "Swimmer": "Swimmer-v5", "classic control": "CartPole-v1"}
"""The groups of tasks with settings of their own, and a task of each."""


def job_of(env_id: str, name: str, seed: int, folder: Path = FOLDER) -> Job:
    """Return a run of the study, half as long as the benchmark's: 512 000 steps on MuJoCo."""
    if name not in CANDIDATES:
        known = ", ".join(CANDIDATES)
        raise SystemExit(f"There are runs of {name!r}. The candidates are {known}. Add it to them.")
    args = replace(TASKS[env_id].args, env_id=env_id, seed=seed)
    lengths = {
        each: getattr(args, each) for each in ("total_steps", "anneal_start", "anneal_steps")
    }
    half = {each: 512 * steps // 1000 for each, steps in lengths.items()}
    return Job(env_id, name, seed, folder, replace(args, **half, **CANDIDATES[name]), pieces=1)


def adopted() -> str:
    """Return the table of the settings of trpo that are not the example's defaults."""
    groups = [comparable(run_of(env_id, "trpo", 0).args) for env_id in GROUPS.values()]
    rows = [["setting", *GROUPS]]
    for name, default in comparable(train.Args()).items():
        values = [each[name] for each in groups]
        if name != "env_id" and values != [default] * len(groups):
            rows.append([f"`{name}`", *map(str, values)])
    return table(*rows)


def candidates(runs: Runs) -> str:
    """Return the table of the candidates that have runs."""
    head = ["candidate", "runs", *SEARCH, "IQM", f"improvement over {TODAY}"]
    rows = [[*head, "CPU s of a run"]]
    for name in CANDIDATES:
        finals = [runs.final(env_id, name) for env_id in SEARCH]
        env_ids = runs.common(name, TODAY, among=SEARCH)
        pair = [runs.returns(each, env_ids) for each in (name, TODAY)]
        cpu = [run[-1]["cpu"] for each in env_ids for run in runs.runs[each, name].values()]
        if env_ids:
            rows.append(
                [
                    *(name, str(sum(map(len, finals)))),
                    *(number(each.mean()) if len(each) else "–" for each in finals),
                    with_interval(IQM, runs.normalised(name, env_ids)),
                    "–" if name == TODAY else with_interval(BETTER, *pair),
                    f"{fmean(cpu):.0f}",
                ]
            )
    return table(*rows)


def main(workers: int = 2, report: bool = False) -> None:
    """Make the runs that are missing, and fill the tables.

    Args:
        workers: Runs side by side.
        report: Fill the tables of the finished runs, and run nothing.
    """
    jobs = [
        job_of(env_id, name, seed) for seed in SEEDS for name in CANDIDATES for env_id in SEARCH
    ]
    if not report:
        play(jobs, ARCHIVE, workers)
    floors = [line for line in lines_of(RESULTS) if line["algorithm"] == RANDOM]
    runs = Runs([*gathered(FOLDER, ARCHIVE, job_of), *floors])
    page.fill(PAGE, settings=adopted(), candidates=candidates(runs))


if __name__ == "__main__":
    tyro.cli(main)
