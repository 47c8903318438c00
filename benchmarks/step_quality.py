"""What buys surrogate gain at the radius, on the step's own batch and on a held-out one.

    PYTHONPATH=examples/advanced python benchmarks/step_quality.py

Writes the first tables and the picture of docs/results/step-quality.md. Every direction is scaled
to the same measured KL on its own batch, so that only directions differ.
"""

from __future__ import annotations

import copy
import statistics
from collections.abc import Iterator
from pathlib import Path

import page
import torch
from matplotlib.figure import Figure
from peers import PEERS, peer
from real_batches import ROLLOUTS, pools
from scene import ITERATIONS, RADIUS, Scene
from step_case import Case, Gains
from table import table
from torch import Tensor

from trpo_optim import StepReport, TrustRegionOptimizer
from trpo_optim.algorithm.conjugate_gradient import RELATIVE_DAMPING, conjugate_gradient

PAGE = Path("docs/results/step-quality.md")
SPLITS = {2: 2, 8: 1}
"""How often each policy's rollouts are divided, by their number in the own batch."""
DENSE = (0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1.0, 3.0)
FIXED = (0.03, 0.1, 0.3)
SHARES = (0.01, 0.02, 0.04, 0.08)
PRODUCTS = (3, 5, 8, 10, 15, 30)


def directions(case: Case, other: Case) -> Iterator[tuple[str, Tensor]]:
    """Yield every candidate's direction, by name.

    Args:
        case: What the step is taken on.
        other: Another batch of the same policy, where a warm start comes from.
    """
    yield "gradient", case.uphill
    fisher = torch.stack([case.product(row) for row in torch.eye(len(case.uphill))]).double()
    for damping in DENSE:
        factor = torch.linalg.cholesky(fisher + damping * torch.eye(len(fisher)))
        solution = torch.cholesky_solve(case.uphill.double()[:, None], factor)[:, 0]
        yield f"dense, λ = {damping:g}", solution
    for damping in FIXED:
        yield f"10 products, λ = {damping:g}", case.solved(damping)
    default = conjugate_gradient(
        case.product, case.uphill, damping=None, iterations=ITERATIONS, tolerance=0.0
    ).damping
    for share in SHARES:
        damping = share / RELATIVE_DAMPING * default
        yield f"10 products, {share:g} of the mean", case.solved(damping)
    for count in PRODUCTS:
        yield f"{count} products, the default damping", case.solved(None, count)
    jacobi = (fisher.diagonal() + default).float().rsqrt()

    def preconditioned(vector: Tensor) -> Tensor:
        return jacobi * (case.product(jacobi * vector) + default * jacobi * vector)

    for count in (5, 10):
        scaled = case.solved(0.0, count, preconditioned, jacobi * case.uphill)
        yield f"{count} products, preconditioned by the exact diagonal", jacobi * scaled
    start = 0.95 * other.solved()
    rest = case.uphill - case.product(start) - default * start
    for count in (1, 5, 10):
        more = case.solved(default, count, uphill=rest)
        yield f"{count} products, from another batch's solution", start + more
    for library in PEERS:
        yield f"{library}'s defaults", case.taken(*peer(library, case.own, defaults=True))


def cases(size: int, splits: int) -> Iterator[tuple[Case, Case]]:
    """Yield the cases of one batch size, each with another batch of the same policy."""
    for split in range(splits):
        generator = torch.Generator().manual_seed(100 * size + split)
        order = torch.randperm(ROLLOUTS, generator=generator).tolist()
        for pool in pools():
            yield Case(pool, order[:size], order[size:]), Case(pool, order[-size:], order[:-size])


def best_of_dense(gains: dict[str, Gains]) -> float:
    """Return the most that a dense solve gains held out."""
    return max(gains[f"dense, λ = {damping:g}"].held_out for damping in DENSE)


def draw(means: dict[int, dict[str, Gains]], path: Path) -> None:
    """Draw both gains against the dense solve's damping, and the held-out one against products."""
    figure = Figure(figsize=(11, 4), layout="constrained")
    left, right = figure.subplots(1, 2)
    for colour, (size, gains) in zip(("C0", "C1"), means.items(), strict=True):
        label, best = f"{1024 * size} samples", best_of_dense(gains)
        dense = [gains[f"dense, λ = {damping:g}"] for damping in DENSE]
        most = max(each.own for each in dense)
        held_out = [each.held_out / best for each in dense]
        left.semilogx(DENSE, held_out, "o-", color=colour, label=label)
        left.semilogx(DENSE, [each.own / most for each in dense], "o:", color=colour)
        ours = gains["10 products, the default damping"].held_out / best
        left.axhline(ours, color=colour, linewidth=0.8)
        by_count = [gains[f"{count} products, the default damping"] for count in PRODUCTS]
        right.plot(PRODUCTS, [each.held_out / best for each in by_count], "o-", color=colour)
        theirs = gains["sb3-contrib's defaults"].held_out / best
        right.axhline(theirs, color=colour, linewidth=0.8)
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


def by_direction() -> str:
    """Return the table of gains by direction, and draw the picture."""
    means: dict[int, dict[str, Gains]] = {}
    for size, splits in SPLITS.items():
        found: dict[str, list[Gains]] = {}
        for case, other in cases(size, splits):
            for name, direction in directions(case, other):
                found.setdefault(name, []).append(case.gains(direction))
        means[size] = {
            name: Gains(*map(statistics.fmean, zip(*gains, strict=True)))
            for name, gains in found.items()
        }
    draw(means, PAGE.with_suffix(".png"))
    rows = [["direction"], *([name] for name in means[2])]
    for size, here in means.items():
        best = best_of_dense(here)
        rows[0] += [f"{1024 * size}: held out", "own"]
        for row in rows[1:]:
            row += [f"{here[row[0]].held_out / best:.3f}", f"{here[row[0]].own / best:.2f}"]
    return table(*rows)


def landing() -> str:
    """Return the table of where steps at the defaults land: 50 random policies, and the real."""
    all_pools = pools()
    scenes = [pool.scene(range(2)) for pool in all_pools]
    for seed in range(50):
        torch.manual_seed(seed)
        pool = all_pools[seed % len(all_pools)]
        policy = copy.deepcopy(pool.policy)
        for parameter in policy.parameters():
            torch.nn.init.normal_(parameter, std=0.1 + 0.1 * (seed % 5))
        scenes.append(Scene(policy, torch.randn(1024, pool.observations.shape[-1])))
    reports: list[StepReport] = []
    for scene in scenes:
        optimizer = TrustRegionOptimizer(scene.parameters, max_kl=RADIUS)
        reports.append(optimizer.step(scene.closure()))
    real, random = reports[: len(all_pools)], reports[len(all_pools) :]
    rows = [["batches", "accepted", "KL / δ, mean (least)", "trials, mean"]]
    for name, group in (("random", random), ("real", real)):
        kls = [report.kl / RADIUS for report in group if report.accepted]
        trials = statistics.mean(report.backtracks + 1 for report in group)
        landed = f"{statistics.mean(kls):.3f} ({min(kls):.3f})"
        rows.append([name, f"{len(kls)} of {len(group)}", landed, f"{trials:.2f}"])
    return table(*rows)


if __name__ == "__main__":
    page.renew(PAGE, {"landing": landing, "directions": by_direction}, threads=2)
