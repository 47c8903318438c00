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

Pong was run from frames with both sampling schemes of the paper, by `examples/advanced/vine.py`
with {path.num_envs} environments. The network has the paper's shape and {weights} parameters. Each
scheme has its own settings:

| | single path | vine |
| --- | --- | --- |
| steps of each environment per update | {path.trunk_steps} | {vine.trunk_steps} |
| max_kl | {path.max_kl} | {vine.max_kl} |
| share of the samples for the products | {path.curvature:.0%} | all |
| passes of the critic | {path.critic_epochs} | {vine.critic_epochs} |
| states in which all six actions are tried | – | {vine.states} |
| steps of a branch | – | {vine.horizon} |

A simulator step is four frames, in which one action is held. With probability 0.25, it is the
action of the previous step. Steps of branches count. The returns are those of the final policy over
{episodes} episodes in separate environments, with their standard errors. One column has sampled
actions, the other the likeliest actions. The picture shows the episodes of training, as running
means of {window}. For vine, these are the episodes of its trunks. {machines}

{table}

![Pong](pong.png)

Vine pays for the value of each action with a branch. At equal simulator steps, it is far behind
single path. With these settings, one seed learns as single path does, at a third of its pace. The
other seed is at −19.6 after 700 000 steps and at −16.7 at the end, by the means of the picture.
Other settings were not better. The following figures are means of the last ten to twenty episodes
of training. They have one seed each, unless two seeds are named.

- With max_kl 0.02, 128 states and branches of 5 steps, two seeds had −18.7 and −20.8 after 700 000
  simulator steps. The policy of the second seed stands still: it has 73 % on the two actions that
  do not move the paddle. A critic whose outputs begin near zero changed nothing: −21.0 after 63 000
  steps, and 78 %.
- The same with 192 states and branches of one and two steps had −20.8 and −20.7 within 100 000
  steps.
- With 64 states and branches of ten steps, two seeds had −21.0 and −20.5 after 675 000 and 611 000
  steps.
- Without a critic, 40 states with branches of 30 steps had −20.5 after 300 000 steps, and 80 states
  with branches of 15 steps had −20.3. 24 states with branches of 15 steps had −20.3 after 140 000.

The following commands use budgets of the size of the paper's: 500 updates of 100 000 simulator
steps by single path and of 390 000 by vine. They were not run here.

    python examples/advanced/vine.py --env-id ALE/Pong-v5 --sampling single-path --num-envs 64 \\
        --trunk-steps 1563 --max-kl 0.01 --curvature 0.1 --critic-epochs 3 --total-steps 50000000 \\
        --checkpoint single-path.pt
    python examples/advanced/vine.py --env-id ALE/Pong-v5 --sampling vine --num-envs 64 \\
        --trunk-steps 400 --states 1000 --horizon 60 --max-kl 0.01 --curvature 0.1 \\
        --critic-epochs 3 --total-steps 193000000 --checkpoint vine.pt
"""

MACHINES = (
    "Single path ran on an H200 until beyond 660 000 steps. Its later steps, and vine, ran on a "
    "core of a small server, which other runs shared."
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
