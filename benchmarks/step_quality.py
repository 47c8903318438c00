"""What buys surrogate gain at the radius, on the step's own batch and on a held-out one.

    PYTHONPATH=examples/advanced python benchmarks/step_quality.py

Prints the tables of docs/results/step-quality.md and draws step-quality.png beside it. Every
direction is scaled to the same measured KL on its own batch, so that only directions differ.
"""

from __future__ import annotations

import copy
import statistics
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import tyro
from defaults import peer_step
from matplotlib.figure import Figure
from peers import Sb3Contrib, Tianshou
from real_batches import RealBatch, pools
from step_case import RADIUS, Case, Gains, closure, dense_fisher
from table import table
from torch import Tensor

from trpo_optim import TrustRegionOptimizer
from trpo_optim.algorithm.conjugate_gradient import RELATIVE_DAMPING, conjugate_gradient

DENSE = [0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1.0, 3.0]
FIXED = [0.03, 0.1, 0.3]
SHARES = [0.01, 0.02, 0.04, 0.08]


def directions(case: Case, other: Case) -> Iterator[tuple[str, Tensor]]:
    """Yield every candidate's direction, by name.

    Args:
        case: What the step is taken on.
        other: Another batch of the same policy, where a warm start comes from.
    """
    yield "gradient", case.uphill
    fisher = dense_fisher(case.policy, case.own.observations)
    identity = torch.eye(len(fisher), dtype=torch.float64)
    for damping in DENSE:
        factor = torch.linalg.cholesky(fisher + damping * identity)
        solution = torch.cholesky_solve(case.uphill.double()[:, None], factor)[:, 0]
        yield f"dense, λ = {damping:g}", solution
    for damping in FIXED:
        yield f"10 products, λ = {damping:g}", case.solved(damping, 10)
    for share in SHARES:
        damping = share / RELATIVE_DAMPING * _relative(case, 10)
        yield f"10 products, {share:g} of the mean", case.solved(damping, 10)
    for iterations in (3, 5, 8, 10, 15, 30):
        yield f"{iterations} products, the default damping", case.solved(None, iterations)
    damping = _relative(case, 10)

    def damped(vector: Tensor) -> Tensor:
        return case.product(vector) + damping * vector

    jacobi = (fisher.diagonal() + damping).float().rsqrt()
    for iterations in (5, 10):
        scaled = conjugate_gradient(
            lambda v: jacobi * damped(jacobi * v),
            jacobi * case.uphill,
            damping=0.0,
            iterations=iterations,
            tolerance=0.0,
        ).x
        yield f"{iterations} products, preconditioned by the exact diagonal", jacobi * scaled
    start = 0.95 * other.solved(None, 10)
    for iterations in (1, 5, 10):
        rest = case.uphill - damped(start)
        more = conjugate_gradient(
            case.product, rest, damping=damping, iterations=iterations, tolerance=0.0
        ).x
        yield f"{iterations} products, from another batch's solution", start + more
    yield "sb3-contrib's defaults", peer_step(case, Sb3Contrib)
    yield "Tianshou's defaults", peer_step(case, Tianshou)


def _relative(case: Case, iterations: int) -> float:
    return conjugate_gradient(
        case.product, case.uphill, damping=None, iterations=iterations, tolerance=0.0
    ).damping


def cases(folder: Path, size: int, splits: int) -> Iterator[tuple[Case, Case]]:
    """Yield the cases of one batch size, each with another batch of the same policy."""
    for split in range(splits):
        generator = torch.Generator().manual_seed(100 * size + split)
        order = torch.randperm(32, generator=generator).tolist()
        for pool in pools(folder):
            yield Case(pool, order[:size]), Case(pool, order[-size:])


def best_of_dense(gains: dict[str, Gains]) -> float:
    """Return the most that a dense solve gains held out."""
    return max(gains[f"dense, λ = {damping:g}"].held_out for damping in DENSE)


def draw(sums: dict[int, dict[str, Gains]], path: Path) -> None:
    """Draw both gains against the dense solve's damping, and the held-out one against products."""
    figure = Figure(figsize=(11, 4), layout="constrained")
    left, right = figure.subplots(1, 2)
    for size, gains in sums.items():
        best = best_of_dense(gains)
        dense = [gains[f"dense, λ = {damping:g}"] for damping in DENSE]
        label = f"{1024 * size} samples"
        (line,) = left.semilogx(DENSE, [each.held_out / best for each in dense], "o-", label=label)
        colour = line.get_color()
        most = max(each.own for each in dense)
        left.semilogx(DENSE, [each.own / most for each in dense], "o:", color=colour)
        ours = gains["10 products, the default damping"]
        left.axhline(ours.held_out / best, color=colour, linewidth=0.8)
        counts = (3, 5, 8, 10, 15, 30)
        by_count = [gains[f"{count} products, the default damping"] for count in counts]
        right.plot(counts, [each.held_out / best for each in by_count], "o-", label=label)
        right.axhline(gains["sb3-contrib's defaults"].held_out / best, color=colour, linewidth=0.8)
    left.set(
        xlabel="damping of a dense solve",
        ylabel="gain / best of the same line",
        title="held out (solid) and own batch (dotted); thin: held out, our defaults",
        ylim=(0, 1.1),
    )
    right.set(
        xlabel="products at the default damping",
        ylabel="held-out gain / best of a dense solve",
        title="thin: sb3-contrib's defaults",
    )
    left.legend()
    figure.savefig(path, dpi=120)


def landing(folder: Path) -> str:
    """Return where steps at the defaults land: 50 random policies, and the real ones."""
    random: list[Any] = []
    all_pools = pools(folder)
    for seed in range(50):
        torch.manual_seed(seed)
        pool = all_pools[seed % len(all_pools)]
        policy = copy.deepcopy(pool.policy)
        for parameter in policy.parameters():
            torch.nn.init.normal_(parameter, std=0.1 + 0.1 * (seed % 5))
        observations = torch.randn(1024, pool.observations.shape[-1])
        with torch.no_grad():
            actions = policy(observations).sample()
        batch = RealBatch(observations, actions, torch.randn(1024))
        optimizer = TrustRegionOptimizer(policy.parameters(), max_kl=RADIUS)
        random.append(optimizer.step(closure(policy, batch)))
    real: list[Any] = []
    for case, _ in cases(folder, 2, 1):
        optimizer = TrustRegionOptimizer(case.policy.parameters(), max_kl=RADIUS)
        real.append(optimizer.step(case.closure))
    rows = [["batches", "accepted", "KL / δ, mean (least)", "trials, mean"]]
    for name, reports in (("50 random", random), ("9 real", real), ("all", random + real)):
        kls = [report.kl / RADIUS for report in reports if report.accepted]
        trials = statistics.mean(report.backtracks + 1 for report in reports)
        landed = f"{statistics.mean(kls):.3f} ({min(kls):.3f})"
        rows.append([name, f"{len(kls)} of {len(reports)}", landed, f"{trials:.2f}"])
    return table(*rows)


def main(folder: Path = Path("runs/pools"), splits: int = 2, threads: int = 2) -> None:
    """Print the tables and draw the picture.

    Args:
        folder: Where the pools are kept; missing ones are made.
        splits: Ways to part each pool, for batches of 2048; half of it for those of 8192.
        threads: CPU threads of torch.
    """
    torch.set_num_threads(threads)
    print(landing(folder))
    sums: dict[int, dict[str, Gains]] = {}
    for size in (2, 8):
        found: dict[str, list[Gains]] = {}
        for case, other in cases(folder, size, splits if size == 2 else max(1, splits // 2)):
            for name, direction in directions(case, other):
                found.setdefault(name, []).append(case.gains(direction))
        sums[size] = {
            name: Gains(
                statistics.mean(each.own for each in gains),
                statistics.mean(each.held_out for each in gains),
            )
            for name, gains in found.items()
        }
    rows = [["direction"], *([name] for name in sums[2])]
    for size, gains in sums.items():
        best = best_of_dense(gains)
        rows[0] += [f"{1024 * size}: held out", "own"]
        for row in rows[1:]:
            here = gains[row[0]]
            row += [f"{here.held_out / best:.3f}", f"{here.own / best:.2f}"]
    print(table(*rows))
    draw(sums, Path("docs/results/step-quality.png"))


if __name__ == "__main__":
    tyro.cli(main)
