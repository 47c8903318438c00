"""Pong's part of docs/results/learning.md: its text, table and picture."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pong
import vine_agent
from evaluation import EPISODES
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter
from table import steps_of, table

COLORS = {"single-path": "#1f5fbf", "vine": "#e8872a"}

WINDOW = 20
"""Episodes in a point of the picture."""

PART = """## Pong

From frames, with a network of the paper's shape, {weights} parameters, by both of its sampling
schemes: `examples/advanced/vine.py` with {path.num_envs} environments, each scheme by settings of
its own. Single path takes {path.trunk_steps} steps of each environment an update, within max_kl
{path.max_kl}, products on {path.curvature:.0%} of them, and {path.critic_epochs} passes of the
critic; vine takes {vine.trunk_steps}, within {vine.max_kl}, products on all and
{vine.critic_epochs} passes, and tries all six actions in {vine.states} of the states, for
{vine.horizon} steps each. A simulator step is four frames, in which one action is held,
with probability 0.25 that of the step before; steps of branches count. Returns of the final policy,
sampled and likeliest actions, in {episodes} episodes on separate environments, with their standard
errors; the picture has the episodes of training (vine's are those of its trunks), means of
{window}. The minutes are those of the machines that made the run: {machines}.

{table}

![Pong](pong.png)

Vine pays for the value of an action with a branch, and is far behind single path at equal simulator
steps. By these settings one seed learns as single path does, at a third of its pace; the other is
at −19.6 after 700 000 steps and −16.7 at the end, in the picture's means. Others did no better;
means of the last ten to twenty episodes of training, one seed unless two are given:

- max_kl 0.02, 128 states, branches of 5 steps: −18.7 and −20.8 after 700 000 simulator steps. The
  second seed's policy stands still (it has 73 % on the two actions that do not move the paddle). A
  critic whose outputs begin near zero changed nothing: −21.0 after 63 000, and 78 %.
- The same with 192 states and branches of one and two steps: −20.8 and −20.7 within 100 000.
- 64 states and branches of ten steps: −21.0 and −20.5 after 675 000 and 611 000, two seeds.
- No critic, 40 states and branches of 30 steps, 80 and 15, 24 and 15: −20.5 and −20.3 after
  300 000, −20.3 after 140 000.

Not run here: commands for budgets of the size of the paper's, 500 updates of 100 000 simulator
steps by single path and of 390 000 by vine:

    python examples/advanced/vine.py --env-id ALE/Pong-v5 --sampling single-path --num-envs 64 \\
        --trunk-steps 1563 --max-kl 0.01 --curvature 0.1 --critic-epochs 3 --total-steps 50000000 \\
        --checkpoint single-path.pt
    python examples/advanced/vine.py --env-id ALE/Pong-v5 --sampling vine --num-envs 64 \\
        --trunk-steps 400 --states 1000 --horizon 60 --max-kl 0.01 --curvature 0.1 \\
        --critic-epochs 3 --total-steps 193000000 --checkpoint vine.pt
"""

MACHINES = (
    "single path's to beyond 660 000 steps an H200; from there, and vine's, a core of a small "
    "server, which other runs had a part of"
)
"""What the archived runs were made on, kept by hand."""


def pong_part(picture: Path) -> str:
    """Draw the picture, and return the part's text.

    Args:
        picture: Where to draw.

    Returns:
        Markdown.
    """
    runs = pong.finished()
    draw(runs, picture)
    return PART.format(
        weights=steps_of(sum(each.numel() for each in vine_agent.pixels(6, 1.0).parameters())),
        path=pong.SETTINGS["single-path"],
        vine=pong.SETTINGS["vine"],
        episodes=EPISODES,
        window=WINDOW,
        machines=MACHINES,
        table=runs_table(runs),
    )


def in_order(runs: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return the runs by scheme and seed."""
    return sorted(runs, key=lambda line: (pong.SCHEMES.index(line["scheme"]), line["seed"]))


def runs_table(runs: list[dict[str, Any]]) -> str:
    """Return the table of the runs."""
    rows = [["scheme", "seed", "simulator steps", "minutes", "episodes", "sampled", "likeliest"]]
    for line in in_order(runs):
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


def draw(runs: list[dict[str, Any]], path: Path) -> None:
    """Draw the returns of the trajectories by simulator steps, running means."""
    figure = Figure(figsize=(7.5, 3.4), layout="constrained")
    axes = figure.add_subplot()
    floor = [value for line in runs if line["scheme"] == "random" for value in line["sampled"]]
    if floor:
        axes.axhline(np.mean(floor), color="gray", lw=0.8, label="random")
    for line in in_order(runs):
        if line["scheme"] in COLORS and len(line["episodes"]) >= WINDOW:
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
