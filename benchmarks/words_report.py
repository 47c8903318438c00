"""The page and the picture of the study of small language models."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any, TypeAlias

import numpy as np
import words
from matplotlib import pyplot as plt
from scipy import stats
from table import table

Run: TypeAlias = dict[str, list[float]]
"""What ``words.train`` returns."""
Runs: TypeAlias = dict[str, dict[float, dict[int, Run]]]
"""Runs of one task: by variant, setting and seed."""

PPO, ONE_RADIUS, ONE_RATE = "ppo", 0.01, 3e-4
"""What others are compared with, the radius that serves all tasks, and a rate to plot rates by."""
COLOURS = {"trpo": "#0072B2", "trpo, diagonal": "#56B4E9", "adamw": "#E69F00", "ppo": "#D55E00"}
HEADER: tuple[str, ...] = (
    *("variant", "setting", "mean reward", "less PPO's"),
    *("greedy at the end", "CPU s, updates", "CPU s, whole run"),
)

PAGE = """# Language models: learning

This page was written by `make bench-words-learning`. [`words.py`](../../examples/words.py) has the
model, the tasks and the loop. Each model is pretrained until a quarter of its answers are right.
Then it learns from rewards alone: {updates} updates of {answers} answers each. All variants start
from the same pretrained model of each seed. There are {seeds} seeds.

- *trpo* takes one step per update. *Diagonal* is `preconditioner="diagonal"`.
- *adamw* takes one step per update, on the same loss. *ppo* takes four passes in four minibatches
  each, with AdamW and a clip of 0.2.
- The mean reward is the mean over all updates of a run. Brackets hold 95 % intervals of the mean
  over seeds (Student's t). *Less PPO's* is the difference from PPO at PPO's best rate, paired by
  seed.
- *Greedy* is the share of right answers to held-out prompts if the likeliest character is always
  written.

![Success against samples, against time, and by setting](language.png)

{sections}

## What the study shows

{verdict}
"""


def grouped(lines: Sequence[Mapping[str, Any]], names: Mapping[str, str]) -> dict[str, Runs]:
    """Return the runs by task, variant, setting and seed.

    Args:
        lines: Finished runs of the study.
        names: The name of each variant's setting.
    """
    tasks: dict[str, Runs] = {}
    for line in lines:
        settings = tasks.setdefault(line["task"], {}).setdefault(line["variant"], {})
        settings.setdefault(line[names[line["variant"]]], {})[line["seed"]] = line["run"]
    return tasks


def success(runs: Mapping[int, Run]) -> dict[int, float]:
    """Return the mean reward of each seed's run."""
    return {seed: fmean(run["reward"]) for seed, run in sorted(runs.items())}


def chosen(settings: Mapping[float, Mapping[int, Run]]) -> float:
    """Return the setting to compare: the one radius, or the best of the rates."""
    return ONE_RADIUS if ONE_RADIUS in settings else best(settings)


def best(settings: Mapping[float, Mapping[int, Run]]) -> float:
    """Return the setting with the highest mean reward, of those that have runs of all seeds."""
    most = max(len(runs) for runs in settings.values())
    whole = [value for value, runs in settings.items() if len(runs) == most]
    return max(whole, key=lambda value: fmean(success(settings[value]).values()))


def apart(ours: Mapping[int, Run], theirs: Mapping[int, Run]) -> list[float]:
    """Return the differences of mean rewards, paired by seed."""
    own, other = success(ours), success(theirs)
    return [own[seed] - other[seed] for seed in own]


def interval(values: Sequence[float]) -> tuple[float, float]:
    """Return the 95 % interval of the mean over seeds."""
    low, high = stats.ttest_1samp(values, 0.0).confidence_interval(0.95)
    return float(low), float(high)


def with_interval(values: Sequence[float], form: str = ".3f") -> str:
    """Return the mean of values over seeds, and its interval."""
    low, high = interval(values)
    return f"{fmean(values):{form}} ({low:{form}} to {high:{form}})"


def row(variant: str, setting: float, runs: Mapping[int, Run], ppo: Mapping[int, Run]) -> list[str]:
    """Return a variant's row."""
    updates = fmean(sum(run["improving"]) for run in runs.values())
    writing = fmean(sum(run["writing"]) for run in runs.values())
    greedy = fmean(run["greedy"][-1] for run in runs.values())
    beside = "" if variant == PPO else with_interval(apart(runs, ppo), "+.3f")
    times = f"{updates:.0f}", f"{updates + writing:.0f}"
    return [
        *(variant, f"{setting:g}", with_interval(list(success(runs).values())), beside),
        *(f"{greedy:.3f}", *times),
    ]


def section(task: str, runs: Runs) -> str:
    """Return a task's two tables: at one radius and at the best settings; over the grids."""
    ppo = runs[PPO][best(runs[PPO])]
    first: list[Sequence[str]] = [HEADER]
    grid: list[Sequence[str]] = [("variant", "mean reward by setting", "worst run")]
    for variant, settings in runs.items():
        value = chosen(settings)
        first.append(row(variant, value, settings[value], ppo))
        cells = [f"{x:g}: {fmean(success(settings[x]).values()):.3f}" for x in sorted(settings)]
        worst = min(min(success(each).values()) for each in settings.values())
        grid.append((variant, ", ".join(cells), f"{worst:.3f}"))
    return f"## {task.capitalize()}\n\n{table(*first)}\n\n{table(*grid)}"


def verdict(tasks: Mapping[str, Runs]) -> str:
    """Return, in a sentence a variant, on how many tasks its interval is on one side of PPO's."""
    sentences = []
    for variant in ("trpo", "trpo, diagonal"):
        above, below, means = [], [], 0
        for task, runs in tasks.items():
            differences = apart(runs[variant][ONE_RADIUS], runs[PPO][best(runs[PPO])])
            low, high = interval(differences)
            above += [task] if low > 0 else []
            below += [task] if high < 0 else []
            means += fmean(differences) >= 0
        sentences.append(
            f"- With δ = {ONE_RADIUS:g}, {variant} has at least PPO's mean reward on {means} of "
            f"{len(tasks)} tasks. The 95 % interval of the difference lies above zero on "
            f"{' and '.join(above) or 'no task'}, and below zero on "
            f"{' and '.join(below) or 'no task'}."
        )
    return "\n".join(sentences)


def draw(tasks: Mapping[str, Runs], path: Path) -> None:
    """Draw success against samples, against time, and by setting: a row a task."""
    plt.rcParams["font.size"] = 15
    figure, rows = plt.subplots(
        *(len(tasks), 3),
        figsize=(16, 4.4 * len(tasks)),
        layout="constrained",
        sharey="row",
        squeeze=False,
    )
    answers = words.PROMPTS * words.COMPLETIONS
    for (task, runs), (left, middle, right) in zip(tasks.items(), rows, strict=True):
        for variant, settings in runs.items():
            value = chosen(settings)
            colour, label = COLOURS[variant], f"{variant}, {value:g}"
            rewards = np.array([run["reward"] for run in settings[value].values()])
            curve = np.apply_along_axis(np.convolve, 1, rewards, np.full(5, 0.2), "valid").mean(0)
            seconds = np.cumsum(
                np.mean(
                    [np.add(run["improving"], run["writing"]) for run in settings[value].values()],
                    axis=0,
                )
            )
            samples = answers * np.arange(3, 3 + len(curve)) / 1000
            left.plot(samples, curve, color=colour, linewidth=2.5, label=label)
            middle.plot(seconds[2 : 2 + len(curve)], curve, color=colour, linewidth=2.5)
            centre = ONE_RADIUS if ONE_RADIUS in settings else ONE_RATE
            grid = sorted(settings)
            places = [x / centre for x in grid]
            means = [fmean(success(settings[x]).values()) for x in grid]
            right.semilogx(places, means, "o-", color=colour, linewidth=2.5)
            for place, x in zip(places, grid, strict=True):
                each = list(success(settings[x]).values())
                right.plot([place] * len(each), each, ".", color=colour, alpha=0.4)
        left.set(ylabel=f"{task}:\nmean reward", xlabel="thousand answers")
        middle.set(xlabel="CPU s of the run")
        right.set(xlabel=f"δ / {ONE_RADIUS:g}, or rate / {ONE_RATE:g}")
        left.legend(fontsize=12)
    figure.savefig(path, dpi=90)
    plt.close(figure)


def write(lines: Sequence[Mapping[str, Any]], names: Mapping[str, str], page: Path) -> None:
    """Write the page and its picture.

    Args:
        lines: Finished runs.
        names: The name of each variant's setting.
        page: The page; the picture has its name.
    """
    tasks = grouped(lines, names)
    runs = next(iter(next(iter(tasks.values())).values()))
    one = next(iter(runs.values()))
    text = PAGE.format(
        updates=len(next(iter(one.values()))["reward"]),
        answers=words.PROMPTS * words.COMPLETIONS,
        seeds=len(one),
        sections="\n\n".join(section(task, each) for task, each in tasks.items()),
        verdict=verdict(tasks),
    )
    page.write_text(text, "utf-8")
    draw(tasks, page.with_suffix(".png"))
