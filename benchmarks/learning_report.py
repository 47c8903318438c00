"""What the learning runs came to: docs/results/learning.md and its pictures, from runs/learning.

    make bench-learning

The statistics are rliable's (Agarwal et al., "Deep Reinforcement Learning at the Edge of the
Statistical Precipice", 2021): interquartile means, stratified bootstrap, performance profiles.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from textwrap import TextWrapper
from typing import Any

import agent
import numpy as np
import step_length
import tyro
from evaluation import EPISODES
from jobs import CLASSIC, CLASSIC_TASKS, MUJOCO, MUJOCO_TASKS, SETTINGS, SWIMMER, VANILLA_LR, Job
from loop import loop_table
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter, MaxNLocator
from pong_report import pong_part
from results import ARCHIVE, gathered, pieces_of, write_archive
from results_page import MACHINES, PAGE, TRIED
from rliable import library, metrics
from scores import ALGORITHMS, TARGETS, Array, Runs
from table import steps_of, table

COLORS = dict(zip(ALGORITHMS, ("#1f5fbf", "#e8872a", "#8e5bb5", "#7f7f7f"), strict=True))


def interval(
    scores: Mapping[str, Any], measure: Callable[..., Any], reps: int
) -> dict[str, tuple[float, float, float]]:
    """Return a measure of each entry with its 95 % stratified bootstrap interval."""
    np.random.seed(0)  # noqa: NPY002 (what rliable draws by)
    points, bounds = library.get_interval_estimates(dict(scores), measure, reps=reps)
    return {
        name: (float(points[name]), float(bounds[name][0, 0]), float(bounds[name][1, 0]))
        for name in scores
    }


def runs_of_each(pair: Mapping[str, Array]) -> str:
    """Return how many runs of a task two algorithms have, in words."""
    return " and ".join(str(len(scores)) for scores in pair.values())


def cell(scores: Array, measure: Callable[..., Any], reps: int) -> str:
    """Return a measure of one task's seeds with its interval, in words."""
    middle, low, high = interval({"": scores[:, None]}, measure, reps)[""]
    return f"{middle:.4g} ({low:.4g} to {high:.4g})"


def per_task(runs: Runs, env_ids: list[str], reps: int) -> str:
    """Return the table of one set of tasks."""
    head = [
        "task",
        "budget (steps)",
        "algorithm",
        "seeds",
        "mean",
        "median",
        "IQM",
        "mean, sampled",
    ]
    rows = [[*head, "target"]]
    for env_id in env_ids:
        for algorithm in ALGORITHMS:
            scores = runs.final(env_id, algorithm)
            if not len(scores):
                continue
            quarters = len(scores) >= 4  # of fewer, nothing is outside the middle half
            sampled = runs.final(env_id, algorithm, "sampled")
            target, source = TARGETS[env_id]
            rows.append(
                [
                    env_id,
                    steps_of(SETTINGS[env_id].total_steps),
                    algorithm,
                    str(len(scores)),
                    cell(scores, np.mean, reps),
                    cell(scores, np.median, reps),
                    cell(scores, metrics.aggregate_iqm, reps) if quarters else "–",
                    cell(sampled, np.mean, reps),
                    f"{target} ({source})",
                ]
            )
    return table(*rows)


def across(runs: Runs, reps: int) -> str:
    """Return the tables over all tasks that two algorithms share."""
    head = ["", "actions", "tasks", "runs of each", "IQM of normalised scores", "IQM of the other"]
    rows = [[*head, "probability of improvement"]]
    for kind in ("deterministic", "sampled"):
        for other, pair in runs.pairs(kind).items():
            iqms = interval(pair, metrics.aggregate_iqm, reps)
            better = interval(
                {"": (pair["trpo"], pair[other])}, metrics.probability_of_improvement, reps
            )
            found = [
                f"{middle:.2f} ({low:.2f} to {high:.2f})"
                for middle, low, high in (iqms["trpo"], iqms[other], better[""])
            ]
            tasks = str(pair[other].shape[1])
            rows.append([f"trpo over {other}", kind, tasks, runs_of_each(pair), *found])
    return table(*rows)


def shortfalls(runs: Runs) -> str:
    """Return the table of the tasks on which trpo's mean is below what is to be reached."""
    rows = [["task", "trpo, mean", "target", "sb3-contrib, mean", "what was tried"]]
    for env_id, (own, peer) in runs.missed().items():
        theirs = "–" if peer is None else f"{peer:.4g}"
        tried = TRIED.get(env_id, "–")
        rows.append([env_id, f"{own:.4g}", str(TARGETS[env_id][0]), theirs, tried])
    return table(*rows)


def draw_curves(runs: Runs, env_ids: list[str], path: Path) -> None:
    """Draw the return of tasks by steps, two beside each other: mean over the seeds, and range."""
    figure = Figure(figsize=(7.5, 2.9 * -(-len(env_ids) // 2)), layout="constrained")
    for index, env_id in enumerate(env_ids):
        axes = figure.add_subplot(-(-len(env_ids) // 2), 2, index + 1)
        for algorithm in ALGORITHMS:
            if not len(runs.final(env_id, algorithm)):
                continue
            steps, returns = runs.curves(env_id, algorithm)
            color = COLORS[algorithm]
            axes.plot(steps, returns.mean(0), color=color, label=algorithm)
            axes.fill_between(steps, returns.min(0), returns.max(0), color=color, alpha=0.15, lw=0)
        axes.axhline(TARGETS[env_id][0], color="black", linewidth=1, linestyle="--")
        axes.set_title(env_id, fontsize=13)
        axes.tick_params(labelsize=12)
        axes.xaxis.set_major_locator(MaxNLocator(4))
        axes.xaxis.set_major_formatter(EngFormatter(sep=""))
    figure.supxlabel("environment steps", fontsize=13)
    figure.supylabel("return", fontsize=13)
    handles, labels = max(
        (axes.get_legend_handles_labels() for axes in figure.axes), key=lambda each: len(each[0])
    )
    figure.legend(handles, labels, loc="outside upper center", ncols=4, frameon=False, fontsize=12)
    figure.savefig(path, dpi=100)


def draw_profiles(runs: Runs, reps: int, path: Path) -> None:
    """Draw which share of runs scores above what, on the tasks that two algorithms share."""
    pairs = runs.pairs()
    figure = Figure(figsize=(4.2 * max(1, len(pairs)), 3.4), layout="constrained")
    marks = np.linspace(0, 2, 81)
    np.random.seed(0)  # noqa: NPY002 (what rliable draws by)
    for index, (other, pair) in enumerate(pairs.items()):
        shares, bounds = library.create_performance_profile(pair, marks, reps=reps)
        axes = figure.add_subplot(1, len(pairs), index + 1)
        for name in pair:
            axes.plot(marks, shares[name], color=COLORS[name], label=name)
            axes.fill_between(marks, *bounds[name], color=COLORS[name], alpha=0.15, lw=0)
        axes.set(xlabel="normalised score τ", ylabel="share of runs above τ", ylim=(0, 1.02))
        title = f"{pair[other].shape[1]} tasks, {runs_of_each(pair)} runs of each"
        axes.set_title(title, fontsize=10)
        axes.legend(frameon=False)
    figure.savefig(path, dpi=100)


def radius_of(env_id: str) -> str:
    """Return a task's radius, in words."""
    envs = agent.make_envs(SETTINGS[env_id])
    envs.close()
    radius = step_length.joint_radius(SETTINGS[env_id], envs.single_action_space)
    return f"{radius:.3g} for {env_id}"


def wrapped(page: str) -> str:
    """Return Markdown whose paragraphs of prose are lines of 128 columns at most."""
    wrapper = TextWrapper(128, break_long_words=False, break_on_hyphens=False)
    parts = page.rstrip().split("\n\n")
    other = ("|", "    ", "- ", "#", "!")
    return (
        "\n\n".join(part if part.startswith(other) else wrapper.fill(part) for part in parts) + "\n"
    )


STUDY = Path("benchmarks/settings_study.md")
"""What was tried for the settings, and on which tasks: kept by hand beside its commands."""


def main(
    folder: Path = Path("runs/learning"), pieces: int = 10, reps: int = 2000, rounds: int = 9
) -> None:
    """Gather the finished runs, and write the page and its pictures.

    Args:
        folder: Where the lines are.
        pieces: Lines of a finished run.
        reps: Bootstrap repetitions.
        rounds: Timed updates of the whole loop.

    Raises:
        SystemExit: If a run was made with other settings than the page says, or is not the
            archive's of that name; the archive then stays as it is.
    """
    lines = gathered(folder, pieces, ARCHIVE)
    runs = Runs(lines)
    for (env_id, algorithm), seeds in runs.runs.items():
        for seed, run in seeds.items():
            job = Job(env_id, algorithm, seed, folder, pieces_of(algorithm, pieces))
            job.require_own(run[-1], len(run))
    write_archive(lines, ARCHIVE)
    trained = [env_id for env_id in SETTINGS if len(runs.final(env_id, "trpo"))]
    draw_curves(runs, trained, Path("docs/results/learning.png"))
    in_all_modes = [env_id for env_id in trained if len(runs.final(env_id, "vanilla"))]
    draw_curves(runs, in_all_modes, Path("docs/results/modes.png"))
    draw_profiles(runs, reps, Path("docs/results/profiles.png"))
    page = PAGE.format(
        episodes=EPISODES,
        machines=MACHINES,
        mujoco=MUJOCO,
        swimmer=SWIMMER,
        radii=", ".join(radius_of(env_id) for env_id in MUJOCO_TASKS),
        whole_length=steps_of(MUJOCO.anneal_start),
        classic=CLASSIC,
        vanilla=VANILLA_LR,
        study=STUDY.read_text("utf-8").strip(),
        mujoco_table=per_task(runs, list(MUJOCO_TASKS), reps),
        classic_table=per_task(runs, list(CLASSIC_TASKS), reps),
        pong=pong_part(Path("docs/results/pong.png")),
        shortfalls=shortfalls(runs),
        across=across(runs, reps),
        loop=loop_table(rounds),
    )
    Path("docs/results/learning.md").write_text(wrapped(page), encoding="utf-8")


if __name__ == "__main__":
    tyro.cli(main)
