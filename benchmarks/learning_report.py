"""What the learning runs came to: the tables of docs/results/learning.md, and its pictures.

    make bench-learning

The statistics are rliable's (Agarwal et al., "Deep Reinforcement Learning at the Edge of the
Statistical Precipice", 2021): interquartile means, stratified bootstrap, performance profiles.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import page
import tyro
from jobs import PEER, RANDOM, gathered
from learning import ARCHIVE, EARLIER, FOLDER, WITH_MODES, job_of
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter, MaxNLocator
from rliable import library, metrics
from scores import Array, Runs
from table import records, steps_of
from tasks import HELD_OUT, SEARCH, TASKS

PAGE = Path("docs/results/learning.md")
COLORS = {
    "trpo": "#1f5fbf",
    EARLIER: "#6fb6e8",
    PEER: "#e8872a",
    "natural": "#8e5bb5",
    "vanilla": "#7f7f7f",
}
"""By algorithm, in the order of the tables."""
SETS = {"search": SEARCH, "held out": HELD_OUT, "all": tuple(TASKS)}
ENOUGH = 10
"""Seeds from which on a table has their IQM."""
REPS = 2000
"""Bootstrap repetitions."""
IQM, BETTER = metrics.aggregate_iqm, metrics.probability_of_improvement


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


def per_task(runs: Runs, env_ids: Sequence[str]) -> str:
    """Return the table of some tasks."""
    return records(
        {
            "task": env_id,
            "steps": steps_of(TASKS[env_id].args.total_steps),
            "algorithm": algorithm,
            "seeds": len(scores),
            "mean": with_interval(np.mean, scores, form=number),
            "IQM": with_interval(IQM, scores, form=number) if len(scores) >= ENOUGH else "–",
            "mean, sampled": number(runs.mean(env_id, algorithm, "sampled")),
            "published": TASKS[env_id].published,
            "target": number(TASKS[env_id].target),
        }
        for env_id in env_ids
        for algorithm in COLORS
        if len(scores := runs.returns(algorithm, [env_id]))
    )


def own(runs: Runs) -> str:
    """Return the algorithm that is compared with the others: trpo, as soon as it has runs."""
    return "trpo" if runs.common("trpo") else EARLIER


def across(runs: Runs) -> str:
    """Return the table over the tasks that two algorithms share."""
    ours, rows = own(runs), []
    for other in (each for each in COLORS if each != ours):
        sets: dict[tuple[str, ...], str] = {}  # by tasks, each once
        for name, among in SETS.items():
            sets.setdefault(tuple(runs.common(ours, other, among=among)), name)
        for env_ids, name in sets.items():
            pair = [runs.returns(each, env_ids) for each in (ours, other)]
            sampled = [runs.returns(each, env_ids, "sampled") for each in (ours, other)]
            if env_ids:
                row = {
                    "": f"{ours} over {other}",
                    "tasks": f"{name} ({len(env_ids)})",
                    "runs of each": " and ".join(str(len(each)) for each in pair),
                    "IQM": with_interval(IQM, runs.normalised(ours, env_ids)),
                    "IQM of the other": with_interval(IQM, runs.normalised(other, env_ids)),
                    "probability of improvement": with_interval(BETTER, *pair),
                    "the same, sampled": with_interval(BETTER, *sampled),
                }
                rows.append(row)
    return records(rows)


def missed(runs: Runs) -> str:
    """Return the table of the tasks on which the mean is below the target."""
    return records(
        {
            "task": env_id,
            "mean": number(runs.mean(env_id, own(runs))),
            "target": number(target),
            f"mean of {PEER}": number(runs.mean(env_id, PEER)),
        }
        for env_id, target in runs.missed(own(runs)).items()
    )


def draw_curves(runs: Runs, env_ids: Sequence[str], columns: int, path: Path) -> None:
    """Draw the return of tasks by steps: the mean over the seeds, and their range."""
    shape = -(-len(env_ids) // columns), columns
    figure = Figure(figsize=(3.75 * columns, 2.9 * shape[0]), layout="constrained")
    labels: dict[str, Any] = {}
    for index, env_id in enumerate(env_ids):
        axes = figure.add_subplot(*shape, index + 1)
        for algorithm, color in COLORS.items():
            if runs.common(algorithm, among=[env_id]):
                steps, returns = runs.curves(env_id, algorithm)
                (labels[algorithm],) = axes.plot(steps, returns.mean(0), color=color)
                span = returns.min(0), returns.max(0)
                axes.fill_between(steps, *span, color=color, alpha=0.15, lw=0)
        if (target := TASKS[env_id].target) is not None:
            axes.axhline(target, color="black", linewidth=1, linestyle="--")
        axes.set_title(env_id, fontsize=13)
        axes.tick_params(labelsize=12)
        axes.xaxis.set_major_locator(MaxNLocator(4))
        axes.xaxis.set_major_formatter(EngFormatter(sep=""))
    figure.supxlabel("environment steps", fontsize=13)
    figure.supylabel("return", fontsize=13)
    place: dict[str, Any] = {"loc": "outside upper center", "ncols": columns + 1, "frameon": False}
    figure.legend(labels.values(), labels, fontsize=12, **place)
    figure.savefig(path, dpi=100)


def draw_profiles(runs: Runs, path: Path) -> None:
    """Draw which share of runs scores above what, on the tasks that two algorithms share."""
    ours = own(runs)
    others = [each for each in COLORS if each != ours and runs.common(ours, each, RANDOM)]
    figure = Figure(figsize=(4.2 * max(1, len(others)), 3.4), layout="constrained")
    marks = np.linspace(0, 2, 81)
    np.random.seed(0)  # noqa: NPY002 (what rliable draws by)
    for index, other in enumerate(others):
        env_ids = runs.common(ours, other, RANDOM)
        pair = {each: runs.normalised(each, env_ids) for each in (ours, other)}
        shares, bounds = library.create_performance_profile(pair, marks, reps=REPS)
        axes = figure.add_subplot(1, len(others), index + 1)
        for name in pair:
            axes.plot(marks, shares[name], color=COLORS[name], label=name)
            axes.fill_between(marks, *bounds[name], color=COLORS[name], alpha=0.15, lw=0)
        axes.set(xlabel="normalised score τ", ylabel="share of runs above τ", ylim=(0, 1.02))
        axes.set_title(f"{len(env_ids)} tasks", fontsize=10)
        axes.legend(frameon=False)
    figure.savefig(path, dpi=100)


def main(folder: Path = FOLDER) -> None:
    """Add the finished runs to the archive, fill the tables and draw the pictures.

    Args:
        folder: Where the runs' lines are.
    """
    runs = Runs(gathered(folder, ARCHIVE, job_of))
    page.fill(
        PAGE,
        search=per_task(runs, SEARCH),
        held_out=per_task(runs, HELD_OUT),
        across=across(runs),
        missed=missed(runs),
    )
    trained = [env_id for env_id in TASKS if any((env_id, each) in runs.runs for each in COLORS)]
    draw_curves(runs, trained, 3, PAGE.with_name("learning.png"))
    draw_curves(runs, WITH_MODES, 2, PAGE.with_name("modes.png"))
    draw_profiles(runs, PAGE.with_name("profiles.png"))


if __name__ == "__main__":
    tyro.cli(main)
