"""What the learning runs came to: docs/results.md and its pictures, from runs/learning.

    make bench-learning

The statistics are rliable's (Agarwal et al., "Deep Reinforcement Learning at the Edge of the
Statistical Precipice", 2021): interquartile means, stratified bootstrap, performance profiles.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Mapping
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np
import pong
import train
import tyro
import vine
from evaluation import EPISODES
from learning import CLASSIC, MUJOCO, SETTINGS, SWIMMER, VANILLA_LR
from loop import loop_table
from matplotlib.figure import Figure
from numpy.typing import NDArray
from results import ARCHIVE, lines_of, packed, unpacked
from rliable import library, metrics
from table import table

Array = NDArray[np.float64]

ALGORITHMS = ("trpo", "sb3-contrib", "natural", "vanilla")
COLORS = dict(zip(ALGORITHMS, ("#1f5fbf", "#e8872a", "#8e5bb5", "#7f7f7f"), strict=True))

TARGETS = {
    "HalfCheetah-v5": (4500, "Tianshou 4471, best of the curve"),
    "Hopper-v5": (3400, "sb3-contrib 3372"),
    "Walker2d-v5": (4500, "sb3-contrib 4502"),
    "Ant-v5": (3600, "sb3-contrib 3554"),
    "Swimmer-v5": (359, "sb3-contrib 359"),
    "Humanoid-v5": (1030, "TRPO+ 1030"),
    "Reacher-v5": (-5, "Tianshou −5.1"),
    "InvertedPendulum-v5": (1000, "Tianshou 1000"),
    "InvertedDoublePendulum-v5": (9000, "Tianshou 8435"),
    "CartPole-v1": (500, "rl-zoo 500"),
    "Acrobot-v1": (-83, "rl-zoo −83"),
    "Pendulum-v1": (-175, "rl-zoo −175"),
    "MountainCarContinuous-v0": (92, "rl-zoo 92.5"),
    "LunarLander-v3": (133, "rl-zoo 133"),
}
"""What to reach, and whose published result it is near."""


class Runs:
    """All evaluations by task and algorithm.

    Args:
        lines: One for each evaluation.
    """

    def __init__(self, lines: list[dict[str, Any]]) -> None:
        runs: dict[tuple[str, str], dict[int, list[Any]]] = defaultdict(lambda: defaultdict(list))
        for line in lines:
            runs[line["environment"], line["algorithm"]][line["seed"]].append(line)
        self.runs = runs

    def final(self, env_id: str, algorithm: str, kind: str = "deterministic") -> Array:
        """Return the final policy's mean return, one number a seed."""
        runs = self.runs.get((env_id, algorithm), {})
        return np.array([fmean(run[-1][kind]) for run in runs.values()])

    def curves(self, env_id: str, algorithm: str) -> tuple[Array, Array]:
        """Return steps, (P,), and every seed's mean returns, (S, P)."""
        runs = self.runs[env_id, algorithm].values()
        returns = [[fmean(line["deterministic"]) for line in run] for run in runs]
        return np.array([line["steps"] for line in next(iter(runs))]), np.array(returns)

    def common(self, *algorithms: str) -> list[str]:
        """Return the tasks that all of these algorithms have runs of."""
        return [
            env_id
            for env_id in SETTINGS
            if all(len(self.final(env_id, each)) for each in algorithms)
        ]

    def normalised(self, algorithm: str, env_ids: list[str], kind: str) -> Array:
        """Return scores, 0 for random actions and 1 for the target, (seeds, tasks).

        Of every task as many seeds as the one with the fewest has.
        """
        columns = []
        for env_id in env_ids:
            floor, scores = self.final(env_id, "random").mean(), self.final(env_id, algorithm, kind)
            columns.append((scores - floor) / (TARGETS[env_id][0] - floor))
        seeds = min(map(len, columns))
        return np.stack([column[:seeds] for column in columns], axis=1)

    def pairs(self, kind: str = "deterministic") -> dict[str, dict[str, Array]]:
        """Return normalised scores of TRPO and of each other algorithm, on the tasks of both."""
        found = {}
        for other in ALGORITHMS[1:]:
            if env_ids := self.common("trpo", other, "random"):
                names = ("trpo", other)
                found[other] = {name: self.normalised(name, env_ids, kind) for name in names}
        return found


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


def steps_of(number: int) -> str:
    """Return a number of steps with its thousands apart."""
    return f"{number:,}".replace(",", " ")


def cell(scores: Array, measure: Callable[..., Any], reps: int) -> str:
    """Return a measure of one task's seeds with its interval, in words."""
    middle, low, high = interval({"": scores[:, None]}, measure, reps)[""]
    return f"{middle:.4g} ({low:.4g} to {high:.4g})"


def per_task(runs: Runs, env_ids: list[str], reps: int) -> str:
    """Return the table of one set of tasks."""
    head = ["task", "steps", "algorithm", "seeds", "mean", "median", "IQM", "mean, sampled"]
    rows = [[*head, "to reach"]]
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
    head = ["", "actions", "tasks", "runs of each", "IQM of normalised scores", "the other's"]
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


def draw_curves(runs: Runs, path: Path) -> None:
    """Draw the return of every task by steps: mean over the seeds, and their range."""
    env_ids = [env_id for env_id in SETTINGS if len(runs.final(env_id, "trpo"))]
    figure = Figure(figsize=(13, 2.7 * -(-len(env_ids) // 4)), layout="constrained")
    for index, env_id in enumerate(env_ids):
        axes = figure.add_subplot(-(-len(env_ids) // 4), 4, index + 1)
        for algorithm in ALGORITHMS:
            if not len(runs.final(env_id, algorithm)):
                continue
            steps, returns = runs.curves(env_id, algorithm)
            color = COLORS[algorithm]
            axes.plot(steps, returns.mean(0), color=color, label=algorithm)
            axes.fill_between(steps, returns.min(0), returns.max(0), color=color, alpha=0.15, lw=0)
        axes.axhline(TARGETS[env_id][0], color="black", linewidth=0.8, linestyle="--")
        axes.set_title(env_id, fontsize=10)
        axes.tick_params(labelsize=8)
    figure.supxlabel("environment steps", fontsize=10)
    handles, labels = figure.axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=4, frameon=False)
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
    envs = train.make_envs(SETTINGS[env_id])
    envs.close()
    return f"{train.joint_radius(SETTINGS[env_id], envs.single_action_space):.3g} for {env_id}"


def pong_table(runs: list[dict[str, Any]]) -> str:
    """Return the table of Pong's runs."""
    rows = [["scheme", "seed", "simulator steps", "minutes", "episodes", "sampled", "likeliest"]]
    for line in runs:
        learned = line["scheme"] != "random"
        kinds = [np.array(line[kind]) for kind in ("sampled", "deterministic") if line[kind]]
        rows.append(
            [
                line["scheme"],
                str(line["seed"]),
                steps_of(line["settings"]["total_steps"]) if learned else "–",
                f"{line['seconds'] / 60:.0f}" if learned else "–",
                str(len(line["episodes"])) if learned else "–",
                *(
                    f"{each.mean():.1f} ± {each.std(ddof=1) / len(each) ** 0.5:.1f}"
                    for each in kinds
                ),
                *["–"] * (2 - len(kinds)),
            ]
        )
    return table(*rows)


def draw_pong(runs: list[dict[str, Any]], path: Path) -> None:
    """Draw the returns of Pong's trajectories by simulator steps, means of twenty episodes."""
    figure = Figure(figsize=(6, 3.4), layout="constrained")
    axes = figure.add_subplot()
    colors = {"single-path": COLORS["trpo"], "vine": COLORS["sb3-contrib"]}
    floor = [value for line in runs if line["scheme"] == "random" for value in line["sampled"]]
    axes.axhline(np.mean(floor), color="gray", lw=0.8, label="random")
    for line in runs:
        if line["scheme"] in colors:
            steps, returns = np.array(line["episodes"]).T
            smooth = np.convolve(returns, np.ones(20) / 20, mode="valid")
            axes.plot(
                steps[19:],
                smooth,
                color=colors[line["scheme"]],
                linestyle=("-", "--", ":")[line["seed"] % 3],
                label=f"{line['scheme']}, seed {line['seed']}",
            )
    axes.set(xlabel="simulator steps", ylabel="return of an episode", title="ALE/Pong-v5")
    axes.legend(frameon=False)
    figure.savefig(path, dpi=100)


PAGE = """# Learning, beside the peers

Written by `make bench-learning`, whose finished runs are in [`results.jsonl.xz`](results.jsonl.xz),
one line of JSON an evaluation; runs that it holds are not made again. Final policies, not the best
of the curve, on separate environments, {episodes} episodes each, deterministic actions (sampled
ones in a column of their own). In brackets 95 % stratified bootstrap intervals by rliable, the
seeds drawn again; with three or five that is little more than their range, and covers less than its
name says. Of fewer than four the interquartile mean would be the mean.

**Settings.** One set for all MuJoCo tasks: `examples/train.py` with max_kl {mujoco.max_kl} and an
initial standard deviation of e^{mujoco.log_std} over the number of action dimensions d, 1 at most
(`--per-dimension`); the radius, joint over the dimensions, is the mean KL {mujoco.max_kl} d:
{radii}.
{mujoco.batch_size} steps an update from {mujoco.num_envs} environments; the length of the steps
stays for {whole_length} environment steps, then falls linearly to zero; the critic is fitted to the
last {mujoco.critic_batches} batches in {mujoco.critic_epochs} passes; gamma {mujoco.gamma} and
gae_lambda {mujoco.gae_lambda}, for Swimmer {swimmer.gamma} and {swimmer.gae_lambda}, by one rule:
λ = 1 − 5(1 − γ). One for classic control: max_kl {classic.max_kl}, {classic.batch_size} steps from
{classic.num_envs} environments, log_std {classic.log_std}, gamma {classic.gamma}, gae_lambda
{classic.gae_lambda}, the same critic, a length that falls from the start. Vanilla's learning rate
is {vanilla} at the start, and falls as the length does.

sb3-contrib's TRPO has the settings that rl-baselines3-zoo publishes for it, on the eleven tasks
with an entry of their own; its KL is a mean over action dimensions. They were made for the v4 of
the MuJoCo tasks (Ant-v5 also observes contact forces) and for LunarLander-v2, and for 2 million
steps on Humanoid. Its runs go on from saved models after each evaluation, in new episodes, most of
them with the random numbers of the start.

{study}

![Learning curves](learning.png)

Deterministic actions, mean over the seeds and their range; dashed, what is to be reached.

## MuJoCo

{mujoco_table}

## Classic control

{classic_table}

## Pong

From frames, with the paper's network of {weights} weights, by both of its sampling schemes:
`examples/vine.py` with max_kl {pong.max_kl}, trunks of {pong.num_envs} environments and
{pong.trunk_steps} steps, products on {pong.curvature:.0%} of the states; vine tries all six actions
in {pong.states} states of every trunk, for {pong.horizon} steps each. A simulator step is four
frames, in which one action is held, with probability 0.25 that of the step before; steps of
branches count. Returns of the final policy, sampled and likeliest actions, in {episodes} episodes
on separate environments, with the standard error of these; the picture has the episodes of training
(vine's are those of its trunks), means of twenty.

{pong_table}

![Pong](pong.png)

Budgets of the size of the paper's, 500 updates of 100 000 simulator steps by single path and of
400 000 by vine:

    python examples/vine.py --env-id ALE/Pong-v5 --sampling single-path --num-envs 64 \\
        --trunk-steps 1563 --max-kl 0.01 --curvature 0.1 --critic-epochs 3 --total-steps 50000000 \\
        --checkpoint single-path.pt
    python examples/vine.py --env-id ALE/Pong-v5 --sampling vine --num-envs 64 --trunk-steps 400 \\
        --states 1000 --horizon 60 --max-kl 0.01 --curvature 0.1 --critic-epochs 3 \\
        --total-steps 193000000 --checkpoint vine.pt

## Across tasks

Scores are 0 for random actions and 1 for the target of the last column above. The probability of
improvement is that of a random run on a random task being better than one of the other algorithm.
Of trpo's seeds, 0 to 3 had a part in the search for settings.

{across}

![Performance profiles](profiles.png)

## The whole loop

Milliseconds of an update of 2048 environment steps on one core, in parts: collecting with
normalised observations; the policy's step with advantages; twenty passes of the critic in
minibatches of 128. sb3-contrib at equal settings: KL, products, passes and minibatches.

{loop}
"""

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
    """
    unpacked(ARCHIVE, folder)
    runs = Runs(packed(folder, pieces, ARCHIVE))
    draw_curves(runs, Path("docs/learning.png"))
    draw_profiles(runs, reps, Path("docs/profiles.png"))
    games = lines_of(pong.ARCHIVE)
    draw_pong(games, Path("docs/pong.png"))
    mujoco = [env_id for env_id, args in SETTINGS.items() if args.max_kl == MUJOCO.max_kl]
    classic = [env_id for env_id in SETTINGS if env_id not in mujoco]
    page = PAGE.format(
        episodes=EPISODES,
        mujoco=MUJOCO,
        swimmer=SWIMMER,
        radii=", ".join(radius_of(env_id) for env_id in mujoco),
        whole_length=steps_of(MUJOCO.anneal_start),
        classic=CLASSIC,
        vanilla=VANILLA_LR,
        study=STUDY.read_text("utf-8").strip(),
        mujoco_table=per_task(runs, mujoco, reps),
        classic_table=per_task(runs, classic, reps),
        pong=pong.SETTINGS,
        pong_table=pong_table(games),
        weights=sum(each.numel() for each in vine.pixels(6, 1.0).parameters()),
        across=across(runs, reps),
        loop=loop_table(rounds),
    )
    Path("docs/results.md").write_text(page, encoding="utf-8")


if __name__ == "__main__":
    tyro.cli(main)
