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
from table import records
from tasks import SEARCH, TASKS

TODAY = "today"
CANDIDATES: dict[str, dict[str, Any]] = {
    TODAY: {},
    "reuse of one batch, half weight": {"reuse": 1, "reuse_weight": 0.5},
    "critic by trust-region steps": {"critic": "trpo", "critic_epochs": 3},
    "16 environments": {"num_envs": 16, "critic_minibatch": 256},
    "16 environments, staggered": {"num_envs": 16, "critic_minibatch": 256, "stagger": True},
    "256 units": {"hidden": 256},
    "beta policy": {"actions": "beta"},
    "critic of 256 units": {"critic_hidden": 256},
    "V-trace targets": {"critic_fresh": True},
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
    return Job(env_id, name, seed, folder, replace(args, **half | CANDIDATES[name]), pieces=1)


def adopted() -> str:
    """Return the table of the settings of trpo that are not the example's defaults."""
    groups = {name: comparable(run_of(env_id, "trpo", 0).args) for name, env_id in GROUPS.items()}
    return records(
        {"setting": f"`{setting}`", **{name: each[setting] for name, each in groups.items()}}
        for setting, default in comparable(train.Args()).items()
        if setting != "env_id" and any(each[setting] != default for each in groups.values())
    )


def candidates(runs: Runs) -> str:
    """Return the table of the candidates that have runs."""
    rows = []
    for name in CANDIDATES:
        env_ids = runs.common(name, TODAY, among=SEARCH)
        made = [run[-1] for each in env_ids for run in runs.runs[each, name].values()]
        pair = [runs.returns(each, env_ids) for each in (name, TODAY)]
        if made:
            row = {
                "candidate": name,
                "runs": len(made),
                **{env_id: number(runs.mean(env_id, name)) for env_id in SEARCH},
                "IQM": with_interval(IQM, runs.normalised(name, env_ids)),
                f"improvement over {TODAY}": with_interval(BETTER, *pair) if name != TODAY else "–",
                "CPU s of a run": round(fmean(line["cpu"] for line in made)),
            }
            rows.append(row)
    return records(rows)


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
