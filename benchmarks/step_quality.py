"""What buys surrogate gain at the radius, on the step's own batch and on a held-out one.

    PYTHONPATH=examples/advanced python benchmarks/step_quality.py

Writes the first tables and the picture of docs/results/step-quality.md. Every direction is scaled
to the same measured KL on its own batch, so that only directions differ.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from statistics import fmean

import page
import pandas as pd
import torch
from matplotlib.figure import Figure
from peers import PEERS, peer
from real_batches import ROLLOUTS, pools
from scene import RADIUS, Scene, solved
from step_case import Case
from table import table
from torch import Tensor

from trpo_optim import TrustRegionOptimizer
from trpo_optim.algorithm.conjugate_gradient import RELATIVE_DAMPING

PAGE = Path("docs/results/step-quality.md")
SPLITS = {2: 2, 8: 1}
"""How often each policy's rollouts are divided, by their number in the own batch."""
DENSE = (0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1.0, 3.0)
FIXED = (0.03, 0.1, 0.3)
SHARES = (0.01, 0.02, 0.04, 0.08)
PRODUCTS = (3, 5, 8, 10, 15, 30)


def directions(case: Case, other: Case) -> Iterator[tuple[str, Tensor]]:
    """Yield every candidate's direction, by name; a warm start comes from another batch."""
    own = partial(solved, case.product, case.uphill)
    yield "gradient", case.uphill
    fisher = torch.stack([case.product(row) for row in torch.eye(len(case.uphill))]).double()
    for damping in DENSE:
        factor = torch.linalg.cholesky(fisher + damping * torch.eye(len(fisher)))
        solution = torch.cholesky_solve(case.uphill.double()[:, None], factor)[:, 0]
        yield f"dense, λ = {damping:g}", solution
    for damping in FIXED:
        yield f"10 products, λ = {damping:g}", own(damping=damping).x
    default = own().damping
    for share in SHARES:
        damping = share / RELATIVE_DAMPING * default
        yield f"10 products, {share:g} of the mean", own(damping=damping).x
    for count in PRODUCTS:
        yield f"{count} products, the default damping", own(iterations=count).x
    jacobi = (fisher.diagonal() + default).float().rsqrt()

    def preconditioned(vector: Tensor) -> Tensor:
        return jacobi * (case.product(jacobi * vector) + default * jacobi * vector)

    for count in (5, 10):
        scaled = solved(preconditioned, jacobi * case.uphill, damping=0.0, iterations=count)
        yield f"{count} products, preconditioned by the exact diagonal", jacobi * scaled.x
    start = 0.95 * solved(other.product, other.uphill).x
    rest = case.uphill - case.product(start) - default * start
    for count in (1, 5, 10):
        more = solved(case.product, rest, damping=default, iterations=count)
        yield f"{count} products, from another batch's solution", start + more.x
    for library in PEERS:
        yield f"{library}'s defaults", case.taken(*peer(library, case.own, defaults=True))


def cases(size: int, splits: int) -> Iterator[tuple[Case, Case]]:
    """Yield the cases of one batch size, each with another batch of the same policy."""
    for split in range(splits):
        generator = torch.Generator().manual_seed(100 * size + split)
        order = torch.randperm(ROLLOUTS, generator=generator).tolist()
        for pool in pools():
            yield Case(pool, order[:size], order[size:]), Case(pool, order[-size:], order[:-size])


def draw(gains: pd.DataFrame, path: Path) -> None:
    """Draw both gains against the dense solve's damping, and the held-out one against products."""
    figure = Figure(figsize=(11, 4), layout="constrained")
    left, right = figure.subplots(1, 2)
    dense = [f"dense, λ = {damping:g}" for damping in DENSE]
    by_count = [f"{count} products, the default damping" for count in PRODUCTS]
    for colour, size in zip(("C0", "C1"), SPLITS, strict=True):
        own, held_out = gains["own", size], gains["held_out", size]
        left.semilogx(DENSE, held_out[dense], "o-", color=colour, label=f"{1024 * size} samples")
        left.semilogx(DENSE, own[dense] / own[dense].max(), "o:", color=colour)
        left.axhline(held_out["10 products, the default damping"], color=colour, linewidth=0.8)
        right.plot(PRODUCTS, held_out[by_count], "o-", color=colour)
        right.axhline(held_out["sb3-contrib's defaults"], color=colour, linewidth=0.8)
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
    found = [
        {"size": size, "direction": name, **case.gains(direction)._asdict()}
        for size, splits in SPLITS.items()
        for case, other in cases(size, splits)
        for name, direction in directions(case, other)
    ]
    means = pd.DataFrame(found).pivot_table(index="direction", columns="size", sort=False)
    best = means["held_out"].filter(like="dense", axis="index").max()
    gains = means.div(best, level="size")
    draw(gains, PAGE.with_suffix(".png"))
    rows = [["direction"], *([name] for name in gains.index)]
    for size in SPLITS:
        rows[0] += [f"{1024 * size}: held out", "own"]
        for row in rows[1:]:
            own, held_out = (gains.loc[row[0]][kind, size] for kind in ("own", "held_out"))
            row += [f"{held_out:.3f}", f"{own:.2f}"]
    return table(*rows)


def landing() -> str:
    """Return the table of where steps at the defaults land: 50 random policies, and the real."""
    real, random = pools(), []
    for seed in range(50):
        torch.manual_seed(seed)
        pool = real[seed % len(real)]
        policy = copy.deepcopy(pool.policy)
        for parameter in policy.parameters():
            torch.nn.init.normal_(parameter, std=0.1 + 0.1 * (seed % 5))
        random.append(Scene(policy, torch.randn(1024, pool.observations.shape[-1])))
    rows = [["batches", "accepted", "KL / δ, mean (least)", "trials, mean"]]
    for name, scenes in (("random", random), ("real", [pool.scene(range(2)) for pool in real])):
        reports = [
            TrustRegionOptimizer(each.parameters, max_kl=RADIUS).step(each.closure())
            for each in scenes
        ]
        kls = [report.kl / RADIUS for report in reports if report.accepted]
        trials = fmean(report.backtracks + 1 for report in reports)
        landed = f"{fmean(kls):.3f} ({min(kls):.3f})"
        rows.append([name, f"{len(kls)} of {len(reports)}", landed, f"{trials:.2f}"])
    return table(*rows)


if __name__ == "__main__":
    page.renew(PAGE, {"landing": landing, "directions": by_direction}, threads=2)
