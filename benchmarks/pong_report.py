"""The table and the picture of docs/results/pong.md."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter
from table import steps_of, table

PAGE = Path("docs/results/pong.md")
COLORS = {"single-path": "#1f5fbf", "vine": "#e8872a", "random": "gray"}
"""By scheme, in the order of the table."""
WINDOW = 20
"""Episodes in a point of the picture."""


def in_order(runs: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return the runs by scheme and seed."""
    return sorted(runs, key=lambda line: (list(COLORS).index(line["scheme"]), line["seed"]))


def runs_table(runs: list[dict[str, Any]]) -> str:
    """Return the table of the runs."""
    rows = [["scheme", "seed", "simulator steps", "minutes", "episodes", "sampled", "likeliest"]]
    for line in in_order(runs):
        cells = ["–"] * 3
        if line["scheme"] != "random":
            steps = steps_of(line["settings"]["total_steps"])
            cells = [steps, f"{line['seconds'] / 60:.0f}", str(len(line["episodes"]))]
        for kind in ("sampled", "deterministic"):
            returns = np.array(line[kind])
            error = returns.std(ddof=1) / len(returns) ** 0.5 if len(returns) else 0.0
            cells.append(f"{returns.mean():.1f} ± {error:.1f}" if len(returns) else "–")
        rows.append([line["scheme"], str(line["seed"]), *cells])
    return table(*rows)


def draw(runs: list[dict[str, Any]], path: Path) -> None:
    """Draw the returns of the trajectories by simulator steps, running means."""
    figure = Figure(figsize=(7.5, 3.4), layout="constrained")
    axes = figure.add_subplot()
    floor = [value for line in runs if line["scheme"] == "random" for value in line["sampled"]]
    axes.axhline(np.mean(floor), color=COLORS["random"], lw=0.8, label="random")
    for line in in_order(runs):
        if line["scheme"] != "random":
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
