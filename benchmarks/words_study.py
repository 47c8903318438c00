"""Small language models trained by reward: trust-region steps beside AdamW and PPO.

    make bench-words-learning

All variants run on every task with every setting of their grids and every seed, from the same
pretrained models. Finished runs are lines of docs/results/language.jsonl.xz. Killed at any moment,
the same command makes the runs that are missing. At the end, it fills docs/results/language.md and
draws docs/results/language.png.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import archived_runs
import tyro
import words
from archived_runs import Line
from words_report import write

SEEDS, FEW = 5, 2
"""Seeds of a setting, and of one that only shows how much a setting matters."""
GOAL = 0.25
"""Share of right answers that ends the pretraining."""
ARCHIVE, MODELS = Path("docs/results/language.jsonl.xz"), Path("runs/words")


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


RATES = "lr", (1e-4, 3e-4, 1e-3), (3e-3,)
DIAGONAL = {"preconditioner": "diagonal"}
VARIANTS = {
    "trpo": Variant("trpo", "max_kl", (0.01,), (0.003, 0.03, 0.1)),
    "trpo, diagonal": Variant("trpo", "max_kl", (0.01,), options=DIAGONAL),
    "adamw": Variant("adamw", *RATES),
    "ppo": Variant("ppo", *RATES),
}
"""What is compared: trpo at one radius, the others at the best of several rates."""


def cases() -> list[Line]:
    """Return all runs, one seed after the other."""
    return [
        {
            "task": task,
            "variant": name,
            "setting": value,
            "seed": seed,
            "settings": {variant.name: value, "goal": GOAL, **variant.options},
        }
        for seed in range(SEEDS)
        for task in words.TASKS
        for name, variant in VARIANTS.items()
        for value in variant.grid + variant.wider * (seed < FEW)
    ]


def play(case: Line) -> list[Line]:
    """Make one run; return a list for each of its figures."""
    optimizer = VARIANTS[case["variant"]].optimizer
    return [
        dict(words.train(case["task"], optimizer, case["seed"], folder=MODELS, **case["settings"]))
    ]


def main(workers: int = 2, report: bool = False) -> None:
    """Make the runs that are missing, and fill the page.

    Args:
        workers: Runs side by side.
        report: Fill the page of the finished runs, and run nothing.

    Raises:
        SystemExit: If there is nothing to report.
    """
    if not report:
        left = archived_runs.missing(ARCHIVE, cases())
        for task, seed in sorted({(case["task"], case["seed"]) for case in left}):
            words.pretrained(task, seed, GOAL, MODELS)  # before two runs need the same model
        archived_runs.make(ARCHIVE, cases(), play, workers=workers)
    lines = [line for run in archived_runs.finished(ARCHIVE, cases()) for line in run]
    if not lines:
        raise SystemExit(f"{ARCHIVE} has no runs. Run this without --report.")
    write(lines)


if __name__ == "__main__":
    tyro.cli(main)
