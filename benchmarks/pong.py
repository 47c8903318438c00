"""Pong from frames, by both sampling schemes of the paper and at random.

    make bench-pong

Finished runs are lines of docs/results/pong.jsonl.xz. Killed at any moment, the same command goes
on where it stopped, from checkpoints in runs/pong. At the end, it fills the table of
docs/results/pong.md and draws docs/results/pong.png.
"""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from pathlib import Path

import archived_runs
import numpy as np
import page
import tyro
import vine
from archived_runs import Line
from checkpoint import comparable
from evaluation import returns_at_random, returns_of
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter
from table import records, steps_of

ARCHIVE = Path("docs/results/pong.jsonl.xz")
PAGE = Path("docs/results/pong.md")
FOLDER = Path("runs/pong")
"""Where runs are kept that are not finished."""
COMMON = vine.Args(env_id="ALE/Pong-v5")
"""Of both schemes; what neither changes is the example's default."""
SETTINGS = {
    "single-path": replace(
        COMMON,
        sampling="single-path",
        total_steps=700_000,
        max_kl=0.02,
        trunk_steps=128,
        curvature=0.1,
        critic_epochs=3,
    ),
    "vine": replace(COMMON, total_steps=1_400_000, max_kl=0.005, horizon=5, critic_epochs=8),
}
COLORS = {"single-path": "#1f5fbf", "vine": "#e8872a", "random": "gray"}
"""By scheme, in the order of the table."""
SEEDS = 2
WINDOW = 20
"""Episodes in a point of the picture."""


def case(scheme: str, seed: int) -> Line:
    """Return a run, and what it is made with."""
    args = replace(SETTINGS.get(scheme, COMMON), seed=seed)
    settings = comparable(args) | {"total_steps": args.total_steps} if scheme in SETTINGS else {}
    return {"scheme": scheme, "seed": seed, "settings": settings}


def play(case: Line, device: str) -> list[Line]:
    """Make a run, or the rest of it; return its episodes and its final returns."""
    scheme, seed = case["scheme"], case["seed"]
    args = replace(SETTINGS.get(scheme, COMMON), seed=seed, device=device)
    if scheme not in SETTINGS:
        return [{"sampled": returns_at_random(vine.make_envs(args), seed), "deterministic": []}]
    run = vine.train(replace(args, checkpoint=FOLDER / f"{scheme}__{seed}.pt"))
    returns = returns_of(vine.make_envs(args), run.agent.act, seed, device)
    return [{"seconds": round(run.seconds), "episodes": run.episodes, **returns}]


def table(lines: list[Line]) -> str:
    """Return the table of the runs."""
    return records(
        {
            "scheme": line["scheme"],
            "seed": line["seed"],
            "simulator steps": steps_of(line["settings"]["total_steps"]) if trained else "–",
            "minutes": round(line["seconds"] / 60) if trained else "–",
            "episodes": len(line["episodes"]) if trained else "–",
            "sampled": with_error(line["sampled"]),
            "likeliest": with_error(line["deterministic"]) if trained else "–",
        }
        for line in lines
        for trained in [line["scheme"] in SETTINGS]
    )


def with_error(returns: list[float]) -> str:
    """Return the mean of returns, and its standard error."""
    return f"{np.mean(returns):.1f} ± {np.std(returns, ddof=1) / len(returns) ** 0.5:.1f}"


def draw(lines: list[Line], path: Path) -> None:
    """Draw the returns of the trajectories by simulator steps, running means."""
    figure = Figure(figsize=(7.5, 3.4), layout="constrained")
    axes = figure.add_subplot()
    floor = [value for line in lines if line["scheme"] == "random" for value in line["sampled"]]
    axes.axhline(np.mean(floor), color=COLORS["random"], lw=0.8, label="random")
    for line in lines:
        if line["scheme"] in SETTINGS:
            steps, returns = np.array(line["episodes"]).T
            axes.plot(
                steps[WINDOW - 1 :],
                np.convolve(returns, np.ones(WINDOW) / WINDOW, mode="valid"),
                color=COLORS[line["scheme"]],
                linestyle=("-", "--", ":")[line["seed"] % 3],
                label=f"{line['scheme']}, seed {line['seed']}",
            )
    axes.xaxis.set_major_formatter(EngFormatter(sep=""))
    axes.set(xlabel="simulator steps", ylabel="return of an episode", title="ALE/Pong-v5")
    figure.legend(frameon=False, loc="outside right upper")
    figure.savefig(path, dpi=100)


def main(device: str = "cpu", report: bool = False) -> None:
    """Make the runs that are missing, and write the table and the picture.

    Args:
        device: Where the networks live: cpu, cuda, ...
        report: Write what the finished runs came to, and run nothing.
    """
    cases = [case(each, seed) for each in COLORS for seed in range(SEEDS)]
    defaults = comparable(vine.Args())
    if not report:
        archived_runs.make(ARCHIVE, cases, partial(play, device=device), defaults)
    lines = [line for run in archived_runs.finished(ARCHIVE, cases, defaults) for line in run]
    page.fill(PAGE, pong=table(lines))
    draw(lines, PAGE.with_name("pong.png"))


if __name__ == "__main__":
    tyro.cli(main)
