"""Compare the three modes on CartPole-v1: a table, and a picture.

    python examples/advanced/demo.py
    python examples/advanced/demo.py --picture docs/demo.png  # the one that README shows

Runs train.py, beside it, once per mode and seed, on all cores; runs and picture stay in runs/.
"""

from __future__ import annotations

import os
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass
from itertools import product
from multiprocessing import get_context
from pathlib import Path
from typing import Literal

import numpy as np
import tyro
from matplotlib.figure import Figure
from numpy.typing import NDArray
from tqdm import tqdm
from train import Args, train

MODES: tuple[Literal["trpo", "natural", "vanilla"], ...] = ("trpo", "natural", "vanilla")
COLORS = ("#0072B2", "#D55E00", "#009E73")
"""Blue, vermilion and green of Okabe and Ito, which colour-blind people can tell apart."""

WINDOW = 20
SOLVED = 475.0
VANILLA_LR = 1.0
"""Vanilla's learning rate, which has no default."""


@dataclass(frozen=True)
class Curves:
    """One run: the mean return of the last 20 episodes, and the KL of each update."""

    mode: str
    seed: int
    steps: NDArray[np.float64]
    returns: NDArray[np.float64]
    kl_steps: NDArray[np.float64]
    kls: NDArray[np.float64]

    def row(self) -> tuple[str, ...]:
        """Return the run's line of the table."""
        solved = np.flatnonzero(self.returns >= SOLVED)
        first = f"{self.steps[solved[0]]:.0f}" if len(solved) else "never"
        kls = f"{np.mean(self.kls):.4f}", f"{np.max(self.kls):.4f}"
        return self.mode, str(self.seed), f"{self.returns[-1]:.1f}", first, *kls


def measure(args: Args) -> Curves:
    """Train one agent and return its curves."""
    run = train(args)
    steps, returns = np.array(run.episodes).T
    kl_steps, kls = np.array(run.kls).T
    means = np.convolve(returns, np.ones(WINDOW) / WINDOW, mode="valid")
    return Curves(args.mode, args.seed, steps[WINDOW - 1 :], means, kl_steps, kls)


def draw(curves: list[Curves], path: Path) -> None:
    """Draw return and KL against environment steps: mean over the seeds, and their range."""
    figure = Figure(figsize=(7.5, 7), layout="constrained")
    top, bottom = figure.subplots(2, 1, sharex=True)
    for mode, color in zip(MODES, COLORS, strict=True):
        runs = [each for each in curves if each.mode == mode]
        grid = runs[0].kl_steps / 1000
        returns = np.stack([np.interp(runs[0].kl_steps, each.steps, each.returns) for each in runs])
        kls = np.stack([each.kls for each in runs])
        for axes, values in ((top, returns), (bottom, np.maximum(kls, 1e-6))):
            axes.plot(grid, values.mean(0), color=color, linewidth=2, label=mode)
            axes.fill_between(grid, values.min(0), values.max(0), color=color, alpha=0.2, lw=0)
    bottom.axhline(Args().max_kl, color="black", linewidth=1, linestyle="--", label="max_kl")
    top.set_title(f"CartPole-v1, {len(curves) // len(MODES)} seeds: mean and range", fontsize=14)
    top.set_ylabel(f"mean return of {WINDOW} episodes", fontsize=14)
    bottom.set_ylabel("KL of an update (nats)", fontsize=14)
    bottom.set_xlabel("environment steps (thousands)", fontsize=14)
    bottom.set_yscale("log")
    bottom.legend(fontsize=13, ncols=2)
    for axes in (top, bottom):
        axes.tick_params(labelsize=13)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=100)


def main(seeds: int = 3, total_steps: int = 100_000, picture: Path = Path("runs/demo.png")) -> None:
    """Train every mode with every seed, print the table, draw the picture.

    Args:
        seeds: Seeds per mode.
        total_steps: Environment steps per run.
        picture: Where the picture goes.
    """
    os.environ["TQDM_DISABLE"] = "1"  # one bar for all runs, not one each
    jobs = [
        Args(
            mode=mode,
            seed=seed,
            total_steps=total_steps,
            lr=VANILLA_LR if mode == "vanilla" else None,
        )
        for mode, seed in product(MODES, range(seeds))
    ]
    with ProcessPoolExecutor(os.cpu_count(), mp_context=get_context("spawn")) as pool:
        futures = [pool.submit(measure, args) for args in jobs]
        for _ in tqdm(as_completed(futures), total=len(jobs), unit="run", disable=False):
            pass
    curves = [future.result() for future in futures]
    head = ("mode", "seed", "mean return of last 20", "steps to 475", "mean KL", "max KL")
    for line in (head, ("---",) * len(head), *(each.row() for each in curves)):
        print("| " + " | ".join(line) + " |")
    draw(curves, picture)
    print(f"picture: {picture}")


if __name__ == "__main__":
    tyro.cli(main)
