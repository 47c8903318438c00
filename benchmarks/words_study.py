"""Small language models trained by reward: trust-region steps beside AdamW and PPO.

    PYTHONPATH=examples python benchmarks/words_study.py --seeds 5
    PYTHONPATH=examples python benchmarks/words_study.py --report

Every variant runs on every task with every setting of its grid and every seed. Each finished run is
one line of runs/words/study.jsonl. If you stop the study, the same command makes only the runs that
are missing. All variants start from the same pretrained models.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from concurrent.futures import as_completed
from dataclasses import dataclass, field
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np
import tyro
import words
from table import table
from tqdm import tqdm
from workers import pool

RADII = "max_kl", (0.003, 0.01, 0.03, 0.1)
RATES = "lr", (1e-4, 3e-4, 1e-3, 3e-3)
BEST: tuple[str, ...] = (
    *("variant", "best setting", "seeds", "mean reward", "95 % interval"),
    *("greedy at the end", "CPU s of updates"),
)
WHOLE: tuple[str, ...] = ("variant", "mean over the grid", "worst", "mean reward by setting")


@dataclass(frozen=True)
class Variant:
    """An optimizer, and the setting of which the study makes runs with several values.

    Attributes:
        optimizer: As ``words.train`` calls it.
        name: The setting: ``"max_kl"`` or ``"lr"``.
        grid: Its values.
        options: Further arguments of the optimizer's class.
    """

    optimizer: words.OptimizerName
    name: str
    grid: tuple[float, ...]
    options: Mapping[str, Any] = field(default_factory=dict)


VARIANTS = {
    "trpo": Variant("trpo", *RADII),
    "trpo, diagonal": Variant("trpo", "max_kl", RADII[1][:3], {"preconditioner": "diagonal"}),
    "adamw": Variant("adamw", *RATES),
    "ppo": Variant("ppo", *RATES),
}
"""What is compared. Add a variant of an optimizer here, with its options."""


@dataclass(frozen=True)
class Study:
    """Which runs to make."""

    tasks: tuple[words.TaskName, ...] = tuple(words.TASKS)
    """tasks of examples/words.py"""
    variants: tuple[str, ...] = tuple(VARIANTS)
    """names of VARIANTS"""
    seeds: int = 5
    """runs of each setting"""
    updates: int | None = None
    """updates of a run; None: the task's number"""
    goal: float = 0.25
    """share of right answers that ends the pretraining"""
    workers: int = 2
    """runs side by side, of one thread each"""
    folder: Path = Path("runs/words")
    """where runs and pretrained models are kept"""
    report: bool = False
    """print the tables of the finished runs, and run nothing"""

    @property
    def lines(self) -> Path:
        """Where the finished runs are written."""
        return self.folder / "study.jsonl"

    def cases(self) -> list[dict[str, Any]]:
        """Return what identifies each run, one seed after the other."""
        return [
            {"task": task, "variant": variant, VARIANTS[variant].name: value, "seed": seed}
            | {"updates": self.updates, "goal": self.goal}
            for seed in range(self.seeds)
            for task in self.tasks
            for variant in self.variants
            for value in VARIANTS[variant].grid
        ]


def finished(path: Path) -> list[dict[str, Any]]:
    """Return the lines of a study; a line that was cut short by a kill is dropped."""
    lines = path.read_text("utf-8").splitlines(keepends=True) if path.exists() else []
    return [json.loads(line) for line in lines if line.endswith("\n")]


def played(case: dict[str, Any], folder: Path) -> dict[str, Any]:
    """Make one run.

    Args:
        case: One of ``Study.cases``.
        folder: Where the pretrained models are.

    Returns:
        The case, and each figure of the run as a list.
    """
    variant = VARIANTS[case["variant"]]
    settings = {name: value for name, value in case.items() if name != "variant"}
    run = words.train(optimizer=variant.optimizer, folder=folder, **settings, **variant.options)
    return {**case, "run": run}


def make(study: Study) -> None:
    """Make the runs that are missing."""
    os.environ["TQDM_DISABLE"] = "1"  # one bar for all runs, not one each
    done = [{k: v for k, v in line.items() if k != "run"} for line in finished(study.lines)]
    missing = [case for case in study.cases() if case not in done]
    study.folder.mkdir(parents=True, exist_ok=True)
    whole = "".join(json.dumps(line) + "\n" for line in finished(study.lines))
    study.lines.write_text(whole, "utf-8")
    with pool(study.workers) as workers, study.lines.open("a", encoding="utf-8") as lines:
        try:
            models = {(case["task"], case["seed"]) for case in missing}
            ready = [
                workers.submit(words.pretrained, *model, study.goal, study.folder)
                for model in sorted(models)
            ]
            for each in ready:
                each.result()  # before two runs need the same model
            runs = [workers.submit(played, case, study.folder) for case in missing]
            for run in tqdm(as_completed(runs), total=len(runs), unit="run", disable=False):
                lines.write(json.dumps(run.result()) + "\n")
                lines.flush()
        finally:
            workers.shutdown(cancel_futures=True)  # after a failure, start no further run


def interval(values: list[float], draws: int = 10_000) -> tuple[float, float]:
    """Return the 95 % bootstrap interval of the mean over seeds."""
    drawn = np.random.default_rng(0).choice(values, (draws, len(values)))
    low, high = np.percentile(drawn.mean(1), [2.5, 97.5])
    return float(low), float(high)


def report(lines: list[dict[str, Any]]) -> str:
    """Return two tables per task: each variant at its best setting, and over its whole grid."""
    grouped: dict[str, dict[str, dict[float, list[Any]]]] = {}
    for line in lines:
        value = line[VARIANTS[line["variant"]].name]
        settings = grouped.setdefault(line["task"], {}).setdefault(line["variant"], {})
        settings.setdefault(value, []).append(line["run"])
    parts = []
    for task, variants in grouped.items():
        best, whole = [BEST], [WHOLE]
        for variant, settings in variants.items():
            success = {x: [fmean(run["reward"]) for run in settings[x]] for x in sorted(settings)}
            means = {x: fmean(success[x]) for x in success}
            top = max(means, key=lambda x: means[x])
            low, high = interval(success[top])
            final = fmean(run["greedy"][-1] for run in settings[top])
            seconds = fmean(sum(run["improving"]) for run in settings[top])
            row = f"{means[top]:.3f}", f"{low:.3f} to {high:.3f}", f"{final:.3f}", f"{seconds:.1f}"
            best.append((variant, f"{top:g}", str(len(success[top])), *row))
            cells = ", ".join(f"{x:g}: {mean:.3f}" for x, mean in means.items())
            whole.append(
                (variant, f"{fmean(means.values()):.3f}", f"{min(means.values()):.3f}", cells)
            )
        parts += [f"## {task}", table(*best), table(*whole)]
    return "\n\n".join(parts)


def main(study: Study) -> None:
    """Make the runs that are missing, and print the tables."""
    if not study.report:
        make(study)
    print(report(finished(study.lines)))


if __name__ == "__main__":
    main(tyro.cli(Study))
