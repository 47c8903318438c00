"""The tables and the picture of the study of small language models."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any, TypeAlias

import numpy as np
import page
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
    *("task", "variant", "setting", "seeds", "mean reward", "less PPO's"),
    *("greedy at the end", "CPU s, updates", "CPU s, whole run"),
)


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


def with_interval(values: Sequence[float], form: str = ".3f") -> str:
    """Return the mean of values over seeds, and its 95 % interval."""
    low, high = stats.ttest_1samp(values, 0.0).confidence_interval(0.95)
    return f"{fmean(values):{form}} ({low:{form}} to {high:{form}})"


def row(variant: str, setting: float, runs: Mapping[int, Run], ppo: Mapping[int, Run]) -> list[str]:
    """Return a variant's row."""
    updates = fmean(sum(run["improving"]) for run in runs.values())
    writing = fmean(sum(run["writing"]) for run in runs.values())
    greedy = fmean(run["greedy"][-1] for run in runs.values())
    beside = "" if variant == PPO else with_interval(apart(runs, ppo), "+.3f")
    reward = with_interval(list(success(runs).values()))
    times = f"{updates:.0f}", f"{updates + writing:.0f}"
    return [variant, f"{setting:g}", str(len(runs)), reward, beside, f"{greedy:.3f}", *times]


def compared(tasks: Mapping[str, Runs]) -> str:
    """Return the table of all variants, at one radius or at the best of the rates."""
    rows: list[Sequence[str]] = [HEADER]
    for task, runs in tasks.items():
        ppo = runs[PPO][best(runs[PPO])]
        for variant, settings in runs.items():
            value = chosen(settings)
            rows.append([task, *row(variant, value, settings[value], ppo)])
    return table(*rows)


def by_setting(tasks: Mapping[str, Runs]) -> str:
    """Return the table of mean rewards over the grids."""
    rows: list[Sequence[str]] = [("task", "variant", "mean reward by setting", "worst run")]
    for task, runs in tasks.items():
        for variant, settings in runs.items():
            cells = [f"{x:g}: {fmean(success(settings[x]).values()):.3f}" for x in sorted(settings)]
            worst = min(min(success(each).values()) for each in settings.values())
            rows.append((task, variant, ", ".join(cells), f"{worst:.3f}"))
    return table(*rows)


def draw(tasks: Mapping[str, Runs], path: Path) -> None:
    """Draw success against samples, against time, and by setting: a row a task."""
    plt.rcParams["font.size"] = 15
    shape, size = (len(tasks), 3), (16, 4.4 * len(tasks))
    figure, rows = plt.subplots(
        *shape, figsize=size, layout="constrained", sharey="row", squeeze=False
    )
    answers = words.PROMPTS * words.COMPLETIONS
    for (task, runs), (left, middle, right) in zip(tasks.items(), rows, strict=True):
        for variant, settings in runs.items():
            value = chosen(settings)
            style: dict[str, Any] = {"color": COLOURS[variant], "linewidth": 2.5}
            kept = list(settings[value].values())
            curve = np.convolve(
                np.mean([run["reward"] for run in kept], axis=0), np.full(5, 0.2), "valid"
            )
            times = [np.add(run["improving"], run["writing"]) for run in kept]
            seconds = np.cumsum(np.mean(times, axis=0))[2 : 2 + len(curve)]
            samples = answers * np.arange(3, 3 + len(curve)) / 1000
            left.plot(samples, curve, label=f"{variant}, {value:g}", **style)
            middle.plot(seconds, curve, **style)
            centre = ONE_RADIUS if ONE_RADIUS in settings else ONE_RATE
            rewards = {x / centre: success(settings[x]).values() for x in sorted(settings)}
            right.semilogx(list(rewards), [fmean(each) for each in rewards.values()], "o-", **style)
            for place, each in rewards.items():
                right.plot([place] * len(each), list(each), ".", color=COLOURS[variant], alpha=0.4)
        left.set(ylabel=f"{task}:\nmean reward", xlabel="thousand answers")
        middle.set(xlabel="CPU s of the run")
        right.set(xlabel=f"δ / {ONE_RADIUS:g}, or rate / {ONE_RATE:g}")
        left.legend(fontsize=12)
    figure.savefig(path, dpi=90)
    plt.close(figure)


def write(lines: Sequence[Mapping[str, Any]], names: Mapping[str, str], path: Path) -> None:
    """Fill a page with the tables of finished runs, and draw the picture beside it."""
    tasks = grouped(lines, names)
    page.fill(path, variants=compared(tasks), settings=by_setting(tasks))
    draw(tasks, path.with_suffix(".png"))
