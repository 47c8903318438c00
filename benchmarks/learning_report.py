"""What the learning runs came to: the tables of docs/results/learning.md, and its pictures.

The statistics are rliable's (Agarwal et al., "Deep Reinforcement Learning at the Edge of the
Statistical Precipice", 2021): interquartile means, stratified bootstrap, performance profiles.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import page
import pandas as pd
import seaborn as sns
from archived_runs import Line
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter, MaxNLocator
from rliable import library, metrics
from scores import KINDS, Array, Finals, frame
from table import records, steps_of
from tasks import EARLIER, HELD_OUT, LONG, PEER, RANDOM, SEARCH, TASKS, WITH_MODES

PAGE = Path("docs/results/learning.md")
COLORS = {
    "trpo": "#1f5fbf",
    EARLIER: "#6fb6e8",
    PEER: "#e8872a",
    "natural": "#8e5bb5",
    "vanilla": "#7f7f7f",
}
"""By algorithm, in the order of the tables."""
PAIRS = (
    *(("trpo", PEER), ("trpo", EARLIER)),
    *((EARLIER, PEER), (EARLIER, "natural"), (EARLIER, "vanilla")),
)
"""What is compared with what; natural and vanilla have the earlier settings."""
SETS = {"search": SEARCH, "held out": HELD_OUT, "all": tuple(TASKS)}
ENOUGH = 10
"""Seeds from which on a table has their IQM."""
REPS = 2000
"""Bootstrap repetitions."""
IQM = metrics.aggregate_iqm


def better(ours: Array, theirs: Array) -> float:
    """Return the probability that a run of ours beats one of theirs; scores are (seeds, tasks).

    It is rliable's ``probability_of_improvement``, whose tests of every task take much longer.
    """
    ahead = ours[:, None] - theirs
    return float((ahead > 0).mean() + 0.5 * (ahead == 0).mean())


def number(value: float | None) -> str:
    """Return a mean return, in words."""
    if value is None:
        return "–"
    return f"{value:.0f}" if abs(value) >= 1e4 else f"{value:.4g}"


def with_interval(
    measure: Callable[..., Any], *scores: Array, form: Callable[[float], str] = "{:.2f}".format
) -> str:
    """Return a measure of scores, (seeds, tasks) each, with its 95 % interval, if there are any."""
    if not all(each.size for each in scores):
        return "–"
    np.random.seed(0)  # noqa: NPY002 (what rliable draws by)
    given = {"": scores[0] if len(scores) == 1 else scores}
    points, bounds = library.get_interval_estimates(given, measure, reps=REPS)
    middle, low, high = (form(float(each)) for each in (points[""], *bounds[""][:, 0]))
    return f"{middle} ({low} to {high})"


def target_of(env_id: str, mean: float) -> str:
    """Return the target of a task, and whether a mean return misses it."""
    target = TASKS[env_id].target
    return number(target) + (" (missed)" if target is not None and mean < target else "")


def per_task(finals: Finals, env_ids: Sequence[str]) -> str:
    """Return the table of some tasks."""
    return records(
        {
            "task": env_id,
            "steps": steps_of(TASKS[env_id].args.total_steps),
            "algorithm": algorithm,
            "seeds": len(scores),
            "mean": with_interval(np.mean, scores, form=number)
            if len(scores) > 1
            else number(float(scores.mean())),
            "IQM": with_interval(IQM, scores, form=number) if len(scores) >= ENOUGH else "–",
            "mean, sampled": number(finals.mean(env_id, algorithm, "sampled")),
            "published": TASKS[env_id].published,
            "target": target_of(env_id, float(scores.mean())),
        }
        for env_id in env_ids
        for algorithm in COLORS
        if len(scores := finals.returns(algorithm, [env_id]))
    )


def across(finals: Finals) -> str:
    """Return the table over the tasks that two algorithms share."""
    rows = []
    for pair in PAIRS:
        sets: dict[tuple[str, ...], str] = {}  # by tasks, each once
        for name, among in SETS.items():
            sets.setdefault(tuple(finals.common(*pair, among=among)), name)
        for env_ids, name in sets.items():
            returns, sampled = (
                [finals.returns(each, env_ids, kind) for each in pair] for kind in KINDS
            )
            iqm, other = (with_interval(IQM, finals.normalised(each, env_ids)) for each in pair)
            row = {
                "": " over ".join(pair),
                "tasks": f"{name} ({len(env_ids)})",
                "runs of each": " and ".join(str(len(each)) for each in returns),
                "IQM": iqm,
                "IQM of the other": other,
                "probability of improvement": with_interval(better, *returns),
                "the same, sampled": with_interval(better, *sampled),
            }
            rows += [row] if env_ids else []
    return records(rows)


def long_runs(evaluations: pd.DataFrame) -> str:
    """Return the table of the runs with three times the steps."""
    runs = evaluations[evaluations["algorithm"] == LONG]
    return records(
        {"steps": steps_of(int(steps)), "seeds": len(each)}
        | {kind: number(each[kind].mean()) for kind in KINDS}
        for steps, each in runs.groupby("steps")
    )


def draw_curves(evaluations: pd.DataFrame, env_ids: Sequence[str], path: Path) -> None:
    """Draw the return of tasks by steps: the mean over the seeds, and their range."""
    grid = sns.relplot(
        evaluations[evaluations["algorithm"].isin(list(COLORS))],
        kind="line",
        x="steps",
        y="deterministic",
        hue="algorithm",
        palette=COLORS,
        hue_order=list(COLORS),
        errorbar=("pi", 100),
        col="environment",
        col_order=env_ids,
        col_wrap=3,
        height=2.9,
        aspect=1.3,
        facet_kws={"sharex": False, "sharey": False},
    )
    grid.set_titles("{col_name}").set_axis_labels("environment steps", "return")
    for env_id, axes in grid.axes_dict.items():
        if (target := TASKS[env_id].target) is not None:
            axes.axhline(target, color="black", linewidth=1, linestyle="--")
        axes.xaxis.set_major_locator(MaxNLocator(4))
        axes.xaxis.set_major_formatter(EngFormatter(sep=""))
    sns.move_legend(grid, "upper center", ncols=len(COLORS), title=None, bbox_to_anchor=(0.5, 1.04))
    grid.savefig(path, dpi=90)


def draw_profiles(finals: Finals, path: Path) -> None:
    """Draw which share of runs scores above what, on the tasks that two algorithms share."""
    pairs = [pair for pair in PAIRS if finals.common(*pair, RANDOM)]
    figure = Figure(figsize=(4.2 * len(pairs), 3.4), layout="constrained")
    marks = np.linspace(0, 2, 81)
    np.random.seed(0)  # noqa: NPY002 (what rliable draws by)
    for axes, pair in zip(figure.subplots(1, len(pairs), squeeze=False)[0], pairs, strict=True):
        env_ids = finals.common(*pair, RANDOM)
        scores = {each: finals.normalised(each, env_ids) for each in pair}
        shares, bounds = library.create_performance_profile(scores, marks, reps=REPS)
        for name in pair:
            axes.plot(marks, shares[name], color=COLORS[name], label=name)
            axes.fill_between(marks, *bounds[name], color=COLORS[name], alpha=0.15, lw=0)
        axes.set(xlabel="normalised score τ", ylabel="share of runs above τ", ylim=(0, 1.02))
        axes.set_title(f"{len(env_ids)} tasks", fontsize=10)
        axes.legend(frameon=False)
    figure.savefig(path, dpi=100)


def write(runs: Sequence[Sequence[Line]]) -> None:
    """Fill the tables of finished runs, and draw the pictures."""
    evaluations = frame(runs)
    finals = Finals(evaluations)
    page.fill(
        PAGE,
        search=per_task(finals, SEARCH),
        held_out=per_task(finals, HELD_OUT),
        across=across(finals),
        long=long_runs(evaluations),
    )
    trained = [each for each in TASKS if any(finals.common(name, among=[each]) for name in COLORS)]
    draw_curves(evaluations, trained, PAGE.with_name("learning.png"))
    draw_curves(evaluations, WITH_MODES, PAGE.with_name("modes.png"))
    draw_profiles(finals, PAGE.with_name("profiles.png"))
