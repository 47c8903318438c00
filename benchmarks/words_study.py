"""Small language models trained by reward: trust-region steps beside AdamW and PPO.

    make bench-words-learning

Every variant runs on every task with every setting of its grid and every seed. Each finished run is
one line of runs/words/study.jsonl. If you stop the study, the same command makes only the runs that
are missing. All variants start from the same pretrained models. At the end, it fills
docs/results/language.md and draws docs/results/language.png.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from concurrent.futures import as_completed
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import tyro
import words
from tqdm import tqdm
from words_report import write
from workers import pool

FEW = 2
"""Seeds of the settings that only show how much a setting matters."""
GOAL = 0.25
"""Share of right answers that ends the pretraining."""
PAGE = Path("docs/results/language.md")


@dataclass(frozen=True)
class Variant:
    """An optimizer, and the setting of which the study makes runs with several values.

    Attributes:
        optimizer: As ``words.train`` calls it.
        name: The setting: ``"max_kl"`` or ``"lr"``.
        grid: Its values, for every seed.
        wider: Further values, for the first ``FEW`` seeds.
        options: Further arguments of the optimizer's class.
    """

    optimizer: words.OptimizerName
    name: str
    grid: tuple[float, ...]
    wider: tuple[float, ...] = ()
    options: Mapping[str, Any] = field(default_factory=dict)

    def values(self, seed: int) -> tuple[float, ...]:
        """Return the settings of a seed's runs."""
        return self.grid + self.wider if seed < FEW else self.grid


RATES = "lr", (1e-4, 3e-4, 1e-3), (3e-3,)
DIAGONAL = {"preconditioner": "diagonal"}
VARIANTS = {
    "trpo": Variant("trpo", "max_kl", (0.01,), (0.003, 0.03, 0.1)),
    "trpo, diagonal": Variant("trpo", "max_kl", (0.01,), options=DIAGONAL),
    "adamw": Variant("adamw", *RATES),
    "ppo": Variant("ppo", *RATES),
}
"""What is compared: trpo at one radius, the others at the best of several rates."""


@dataclass(frozen=True)
class Study:
    """Which runs to make."""

    tasks: tuple[words.TaskName, ...] = tuple(words.TASKS)
    """tasks of examples/words.py"""
    variants: tuple[str, ...] = tuple(VARIANTS)
    """names of VARIANTS"""
    seeds: int = 5
    """runs of each setting"""
    workers: int = 2
    """runs side by side, of one thread each"""
    folder: Path = Path("runs/words")
    """where runs and pretrained models are kept"""
    report: bool = False
    """fill the page of the finished runs, and run nothing"""

    @property
    def lines(self) -> Path:
        """Where the finished runs are written."""
        return self.folder / "study.jsonl"

    def cases(self) -> list[dict[str, Any]]:
        """Return what identifies each run, one seed after the other."""
        return [
            {"task": task, "variant": variant, VARIANTS[variant].name: value, "seed": seed}
            | {"updates": None, "goal": GOAL}
            for seed in range(self.seeds)
            for task in self.tasks
            for variant in self.variants
            for value in VARIANTS[variant].values(seed)
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
                workers.submit(words.pretrained, *model, GOAL, study.folder)
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


def main(study: Study) -> None:
    """Make the runs that are missing, and fill the page."""
    if not study.report:
        make(study)
    names = {variant: each.name for variant, each in VARIANTS.items()}
    write(finished(study.lines), names, PAGE)


if __name__ == "__main__":
    main(tyro.cli(Study))
