"""The tables and the picture of the study of small language models."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import page
import pandas as pd
import words
from archived_runs import Line
from matplotlib import pyplot as plt
from scipy import stats
from table import records

PAGE = Path("docs/results/language.md")
PPO, ONE_RADIUS, ONE_RATE = "ppo", 0.01, 3e-4
"""What others are compared with, the radius that serves all tasks, and a rate to plot rates by."""
COLOURS = {"trpo": "#0072B2", "trpo, diagonal": "#56B4E9", "adamw": "#E69F00", "ppo": "#D55E00"}


def frame(lines: Sequence[Line]) -> pd.DataFrame:
    """Return a row for each run: its lists of figures, and ``mean``, its mean reward."""
    return pd.DataFrame([{**line, "mean": np.mean(line["reward"])} for line in lines])


def chosen(runs: pd.DataFrame) -> float:
    """Return the setting of a variant to compare: the one radius, or the best of the rates.

    The best has the highest mean reward, of the settings with runs of all seeds.
    """
    by_setting = runs.groupby("setting")["mean"].agg(["count", "mean"])
    if ONE_RADIUS in by_setting.index:
        return ONE_RADIUS
    whole = by_setting[by_setting["count"] == by_setting["count"].max()]
    return float(whole["mean"].idxmax())


def with_interval(values: pd.Series[float], form: str = ".3f") -> str:
    """Return the mean of values over seeds, and its 95 % interval."""
    low, high = stats.ttest_1samp(values, 0.0).confidence_interval(0.95)
    return f"{values.mean():{form}} ({low:{form}} to {high:{form}})"


def compared(runs: pd.DataFrame) -> str:
    """Return the table of all variants, at one radius or at the best of the rates."""
    rows = []
    for task, of_task in runs.groupby("task", sort=False):
        at = {
            name: of_variant[of_variant["setting"] == chosen(of_variant)].set_index("seed")
            for name, of_variant in of_task.groupby("variant", sort=False)
        }
        for name, kept in at.items():
            ahead = kept["mean"] - at[PPO]["mean"]
            updates, writing = (kept[each].map(sum).mean() for each in ("improving", "writing"))
            row = {
                "task": task,
                "variant": name,
                "setting": f"{kept['setting'].iloc[0]:g}",
                "seeds": len(kept),
                "mean reward": with_interval(kept["mean"]),
                "less PPO's": "" if name == PPO else with_interval(ahead, "+.3f"),
                "greedy at the end": f"{kept['greedy'].map(lambda each: each[-1]).mean():.3f}",
                "CPU s, updates": f"{updates:.0f}",
                "CPU s, whole run": f"{updates + writing:.0f}",
            }
            rows.append(row)
    return records(rows)


def by_setting(runs: pd.DataFrame) -> str:
    """Return the table of mean rewards over the grids."""
    return records(
        {
            "task": task,
            "variant": variant,
            "mean reward by setting": ", ".join(
                f"{setting:g}: {mean:.3f}"
                for setting, mean in each.groupby("setting")["mean"].mean().items()
            ),
            "worst run": f"{each['mean'].min():.3f}",
        }
        for (task, variant), each in runs.groupby(["task", "variant"], sort=False)
    )


def draw(runs: pd.DataFrame, path: Path) -> None:
    """Draw success against samples, against time, and by setting: a row a task."""
    plt.rcParams["font.size"] = 15
    tasks = runs["task"].unique()
    shape, size = (len(tasks), 3), (16, 4.4 * len(tasks))
    figure, rows = plt.subplots(
        *shape, figsize=size, layout="constrained", sharey="row", squeeze=False
    )
    answers = words.PROMPTS * words.COMPLETIONS
    for task, (left, middle, right) in zip(tasks, rows, strict=True):
        for variant, each in runs[runs["task"] == task].groupby("variant", sort=False):
            value = chosen(each)
            style: dict[str, Any] = {"color": COLOURS[str(variant)], "linewidth": 2.5}
            kept = each[each["setting"] == value]
            reward, improving, writing = (
                np.mean(np.stack(kept[name].map(np.array).to_list()), axis=0)
                for name in ("reward", "improving", "writing")
            )
            curve = np.convolve(reward, np.full(5, 0.2), "valid")
            samples = answers * np.arange(3, 3 + len(curve)) / 1000
            left.plot(samples, curve, label=f"{variant}, {value:g}", **style)
            middle.plot(np.cumsum(improving + writing)[2 : 2 + len(curve)], curve, **style)
            places = each["setting"] / (ONE_RADIUS if value == ONE_RADIUS else ONE_RATE)
            right.semilogx(each["mean"].groupby(places).mean(), "o-", **style)
            right.plot(places, each["mean"], ".", color=COLOURS[str(variant)], alpha=0.4)
        left.set(ylabel=f"{task}:\nmean reward", xlabel="thousand answers")
        middle.set(xlabel="CPU s of the run")
        right.set(xlabel=f"δ / {ONE_RADIUS:g}, or rate / {ONE_RATE:g}")
        left.legend(fontsize=12)
    figure.savefig(path, dpi=90)
    plt.close(figure)


def write(lines: Sequence[Line], path: Path = PAGE) -> None:
    """Fill a page with the tables of finished runs, and draw the picture beside it."""
    runs = frame(lines)
    page.fill(path, variants=compared(runs), settings=by_setting(runs))
    draw(runs, path.with_suffix(".png"))
