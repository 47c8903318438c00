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
from table import steps_of, table
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


def number(value: float) -> str:
    """Return a mean return, in words."""
    return f"{value:.0f}" if abs(value) >= 1e4 else f"{value:.4g}"


def two_places(value: float) -> str:
    """Return a score or a probability, in words."""
    return f"{value:.2f}"


def with_interval(
    measure: Callable[..., Any], *scores: Array, form: Callable[[float], str] = two_places
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
    head = ["task", "steps", "algorithm", "seeds", "mean", "IQM", "mean, sampled"]
    rows = [[*head, "published", "target"]]
    for env_id in env_ids:
        task = TASKS[env_id]
        target = "–" if task.target is None else number(task.target)
        for algorithm in (each for each in COLORS if runs.common(each, among=[env_id])):
            scores = runs.returns(algorithm, [env_id])
            rows.append(
                [
                    *(env_id, steps_of(task.args.total_steps), algorithm, str(len(scores))),
                    with_interval(np.mean, scores, form=number),
                    with_interval(
                        IQM, scores if len(scores) >= ENOUGH else scores[:0], form=number
                    ),
                    number(runs.final(env_id, algorithm, "sampled").mean()),
                    *(task.published, target),
                ]
            )
    return table(*rows)


def own(runs: Runs) -> str:
    """Return the algorithm that is compared with the others: trpo, as soon as it has runs."""
    return "trpo" if runs.common("trpo") else EARLIER


def across(runs: Runs) -> str:
    """Return the table over the tasks that two algorithms share."""
    head = ["", "tasks", "number of tasks", "runs of each", "IQM", "IQM of the other"]
    rows = [[*head, "probability of improvement", "the same, sampled"]]
    ours = own(runs)
    for other in (each for each in COLORS if each != ours):
        sets: dict[tuple[str, ...], str] = {}  # by tasks, each once
        for name, among in SETS.items():
            sets.setdefault(tuple(runs.common(ours, other, among=among)), name)
        for env_ids, name in sets.items():
            if not env_ids:
                continue
            pair = [runs.returns(each, env_ids) for each in (ours, other)]
            sampled = [runs.returns(each, env_ids, "sampled") for each in (ours, other)]
            rows.append(
                [
                    *(f"{ours} over {other}", name, str(len(env_ids))),
                    " and ".join(str(len(each)) for each in pair),
                    with_interval(IQM, runs.normalised(ours, env_ids)),
                    with_interval(IQM, runs.normalised(other, env_ids)),
                    with_interval(BETTER, *pair),
                    with_interval(BETTER, *sampled),
                ]
            )
    return table(*rows)


def missed(runs: Runs) -> str:
    """Return the table of the tasks on which the mean is below the target."""
    rows = [["task", "mean", "target", f"mean of {PEER}"]]
    for env_id, target in runs.missed(own(runs)).items():
        peer = runs.final(env_id, PEER)
        theirs = number(peer.mean()) if len(peer) else "–"
        rows.append([env_id, number(runs.final(env_id, own(runs)).mean()), number(target), theirs])
    return table(*rows)


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
    trained = runs.common(own(runs))
    draw_curves(runs, trained, 3, PAGE.with_name("learning.png"))
    draw_curves(runs, WITH_MODES, 2, PAGE.with_name("modes.png"))
    draw_profiles(runs, PAGE.with_name("profiles.png"))


if __name__ == "__main__":
    tyro.cli(main)
