"""Algorithm 1 of the paper beside what is used in practice: a table and a picture.

    python examples/theory/monotonic.py

Every expectation is enumerated. The fixed rates are such that the first KL is about the radius.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any, TypeAlias

import torch
import tyro
from matplotlib.figure import Figure
from torch import Tensor, nn
from torch.distributions import Categorical, kl_divergence
from tqdm import tqdm

import trpo_optim.theory as exact
from trpo_optim import Closure, TrustRegionOptimizer

RADIUS = 0.01
HEAD = ("algorithm", "final η", "steps to 99 %", "falls", "steps that (9) promised")
COLORS = ("#c1272d", "#e8872a", "#8fd18f", "#1f5fbf", "#8e5bb5", "#7f7f7f")
Step: TypeAlias = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Run:
    """One algorithm's exact return before and after each step, and bound (9) of each step."""

    name: str
    returns: list[float]
    promised: list[float]

    @property
    def gains(self) -> list[float]:
        """What each step added to the return."""
        return [after - before for before, after in pairwise(self.returns)]

    def steps_to(self, share: float, optimum: float) -> int | None:
        """Return how many steps that share of the way to the optimum took, or None."""
        mark = self.returns[0] + share * (optimum - self.returns[0])
        return next((step for step, each in enumerate(self.returns) if each >= mark), None)

    def row(self, optimum: float) -> tuple[str, ...]:
        """Return the run's line of the table."""
        falls = sum(gain < -1e-12 for gain in self.gains)  # by more than rounding
        promised = f"{sum(each > 0 for each in self.promised)} of {len(self.promised)}"
        figures = f"{self.returns[-1]:.4f}", str(self.steps_to(0.99, optimum) or "never")
        return self.name, *figures, str(falls), promised


def exact_closure(mdp: exact.TabularMDP, logits: Tensor) -> Closure:
    """Return the closure of problem (12) at the present table, its expectations enumerated."""
    old = Categorical(logits=logits.detach().clone())
    visits = (1 - mdp.gamma) * mdp.visitation(old.probs)
    advantages = mdp.advantages(old.probs)

    def closure() -> tuple[Tensor, Tensor]:
        dist = Categorical(logits=logits)
        return -visits @ (dist.probs * advantages).sum(1), visits @ kl_divergence(old, dist)

    return closure


def optimizer_step(mdp: exact.TabularMDP, **settings: Any) -> Step:
    """Return the optimizer's step on a softmax table, which is uniform at first."""
    logits = nn.Parameter(torch.zeros_like(mdp.rewards))
    optimizer = TrustRegionOptimizer([logits], **settings)

    def step(_: Tensor) -> Tensor:
        optimizer.step(exact_closure(mdp, logits))
        return logits.detach().softmax(1)

    return step


def compare(mdp: exact.TabularMDP, iterations: int) -> tuple[list[Run], float]:
    """Run every algorithm from the uniform policy; return the runs and the optimal return."""
    uniform = torch.full_like(mdp.rewards, 1 / mdp.rewards.shape[1])
    best = uniform
    while not torch.equal(best, better := exact.policy_iteration_step(mdp, best)):
        best = better
    optimum = mdp.expected_return(best)
    steps: dict[str, Step] = {
        "Algorithm 1: penalty C": lambda policy: exact.monotonic_step(mdp, policy),
        "conservative iteration (5)": lambda policy: exact.conservative_step(mdp, policy),
        "max KL ≤ δ (11)": lambda policy: exact.constrained_step(mdp, policy, RADIUS),
        "TRPO: mean KL ≤ δ (12)": optimizer_step(mdp, max_kl=RADIUS),
        "natural, fixed rate (17)": optimizer_step(mdp, mode="natural", max_kl=None, lr=0.15),
        "vanilla, fixed rate (18)": optimizer_step(mdp, mode="vanilla", lr=1.7),
    }
    runs = [Run(name, [mdp.expected_return(uniform)], []) for name in steps]
    for run, step in zip(tqdm(runs, unit="algorithm"), steps.values(), strict=True):
        policy = uniform
        while len(run.promised) < iterations and run.steps_to(1 - 1e-6, optimum) is None:
            new = step(policy).clamp_min(1e-30)  # the next KL needs every action
            run.promised.append(exact.lower_bound(mdp, policy, new) - run.returns[-1])
            run.returns.append(mdp.expected_return(new))
            policy = new
    return runs, optimum


def draw(runs: list[Run], optimum: float, path: Path) -> None:
    """Draw the return by iteration, and bound (9) of every step over what it gained."""
    figure = Figure(figsize=(11, 4.6), layout="constrained")
    left, right = figure.subplots(1, 2)
    left.axhline(optimum, color="black", linewidth=0.9, linestyle="--", label="optimum")
    right.plot([1e-4, 1], [1e-4, 1], color="black", linewidth=0.9, linestyle="--")
    right.axhspan(0, 10, color="#2ca02c", alpha=0.08)
    for run, color, width, dot in zip(runs, COLORS, (2, 2, 5, 1.6, 2, 2), "osDvPX", strict=True):
        left.plot(run.returns, color=color, linewidth=width, label=run.name)
        right.plot(run.gains, run.promised, dot, color=color, markersize=4, alpha=0.6, mew=0)
    left.set_xscale("symlog", linthresh=1)
    left.set(title="Return by iteration", xlabel="iteration", ylabel="return η(π)", xlim=(0, None))
    left.xaxis.set_major_formatter("{x:.0f}")
    left.legend(loc="upper left", bbox_to_anchor=(0, 0.94), fontsize=8.5, frameon=False)
    right.set_yscale("symlog", linthresh=1e-4)
    right.set(xscale="log", xlabel="what the step gained", xlim=(1e-4, 1.2), ylim=(-30, 2))
    right.set(title="Every step: its gain and its bound", ylabel="what bound (9) promised")
    right.text(1.3e-4, 0.3, "the return must rise", fontsize=9)
    right.text(1.3e-4, -1.2, "as far as the bound tells, the return may fall", fontsize=9)
    right.text(5e-3, 1.7e-2, "gain = bound", fontsize=9, rotation=24)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)


def main(
    iterations: int = 200, seed: int = 1, picture: Path = Path("docs/concepts/monotonic.png")
) -> None:
    """Run every algorithm, print the table, draw the picture.

    Args:
        iterations: The most steps of each.
        seed: Of the process.
        picture: Where the picture goes.
    """
    runs, optimum = compare(exact.random_mdp(5, 3, 0.8, seed), iterations)
    for line in (HEAD, ("---",) * len(HEAD), *(run.row(optimum) for run in runs)):
        print("| " + " | ".join(line) + " |")
    draw(runs, optimum, picture)
    print(f"optimal η: {optimum:.4f}; picture: {picture}")


if __name__ == "__main__":
    tyro.cli(main)
