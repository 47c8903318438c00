"""How many rows of a batch Fisher-vector products need.

    PYTHONPATH=examples/advanced python benchmarks/curvature_share.py

Writes the other tables of docs/results/step-quality.md. The gradient is that of the whole own
batch, the products are taken on a random part of it. Every direction is scaled to the same measured
KL on the whole own batch, so that only directions differ.
"""

from __future__ import annotations

import math
import statistics
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

import page
import torch
import train
from real_batches import Pool, pools
from step_case import Case, Gains, Product
from step_quality import PAGE
from table import percent, steps_of, table
from torch import Tensor

ROLLOUTS = 128  # of each pool
HELD_OUT = 64  # rollouts that judge a step
SPLITS = {2: 4, 8: 8, 20: 2, 64: 1}
"""How often a pool is divided, by the own batch's rollouts."""
SHARES = (0.05, 0.1, 0.25, 0.5)
ROWS = (512, 1024, 2048, 4096, 8192)
Kind = Literal["rows", "sequences", "sampled"]
"""Random rows, all steps of random environments, random rows whose KL is estimated on actions."""
HEAD = ["rows for products", "share", "held out, mean", "held out, worst real batch"]
HEAD += ["standard error, mean", "own, mean", "KL / δ of the first trial"]


@dataclass
class Found:
    """What one part of one real batch gained.

    Attributes:
        gains: Of every split and draw, each beside the gains of the products on all rows.
        first_kls: The KLs, over the radius, of the steps whose length the part's products gave.
    """

    gains: list[tuple[Gains, Gains]] = field(default_factory=list)
    first_kls: list[float] = field(default_factory=list)

    def relative(self) -> Gains:
        """Return the mean gains over those of the products on all rows."""
        part, whole = (Gains.mean(each) for each in zip(*self.gains, strict=True))
        return Gains(part.own / whole.own, part.held_out / whole.held_out)

    def noise(self) -> float:
        """Return the standard error of the relative held-out gain, from its spread."""
        whole = statistics.mean(each.held_out for _, each in self.gains)
        losses = [whole.held_out - part.held_out for part, whole in self.gains]
        return statistics.pstdev(losses) / math.sqrt(max(1, len(losses) - 1)) / whole

    def held_out(self) -> str:
        """Return the relative held-out gain in words."""
        return f"{self.relative().held_out:.3f} ± {self.noise():.3f}"


def order(kind: Kind, size: int, generator: torch.Generator) -> Tensor:
    """Return an order of the own rows; a part is its beginning.

    Args:
        kind: ``"sequences"`` keeps what one environment did in a rollout together.
        size: How many rows there are.
        generator: What draws the order.
    """
    if kind != "sequences":
        return torch.randperm(size, generator=generator)
    environments = train.Args.num_envs
    steps = train.Args.batch_size // environments
    rows = torch.arange(size).reshape(-1, steps, environments).transpose(1, 2).reshape(-1, steps)
    return rows[torch.randperm(len(rows), generator=generator)].flatten()


def outcome(case: Case, product: Product) -> tuple[Gains, float]:
    """Return what a product's direction gains, and the first trial's KL over the radius."""
    direction = case.solved(product=product)
    return case.gains(direction), case.first_kl(direction, product)


def study(
    all_pools: Sequence[Pool],
    rollouts: int,
    counts: Sequence[int],
    *,
    splits: int,
    draws: int = 3,
    kind: Kind = "rows",
) -> dict[int, dict[str, Found]]:
    """Return what each number of rows for products gained, by policy.

    Args:
        all_pools: The real policies.
        rollouts: Of the own batch.
        counts: Numbers of its rows to take products on.
        splits: Ways to divide each pool.
        draws: Parts of each own batch.
        kind: What a part is.
    """
    found: dict[int, dict[str, Found]] = defaultdict(lambda: defaultdict(Found))
    for split in range(splits):
        generator = torch.Generator().manual_seed(1000 * rollouts + split)
        for pool in all_pools:
            mixed = torch.randperm(len(pool.advantages), generator=generator).tolist()
            case = Case(pool, mixed[:rollouts], mixed[rollouts:][:HELD_OUT])
            size = len(case.own.advantages)
            orders = [order(kind, size, generator) for _ in range(draws)]
            products = [(size, torch.arange(size))]
            products += [(count, rows[:count]) for count in counts for rows in orders]
            whole: Gains | None = None
            for count, rows in products:
                part = case.product_on(rows, sampled=kind == "sampled")
                gains, first_kl = outcome(case, part)
                whole = whole or gains
                found[count][pool.name].gains.append((gains, whole))
                found[count][pool.name].first_kls.append(first_kl)
    return found


def row(size: int, count: int, by_pool: dict[str, Found]) -> list[str]:
    """Return one row of the table.

    Args:
        size: Of the own batch.
        count: How many of its rows the products were taken on.
        by_pool: What they gained, by the real policy's name.
    """
    worst = min(by_pool, key=lambda name: by_pool[name].relative().held_out)
    relative = [each.relative() for each in by_pool.values()]
    return [
        steps_of(count),
        percent(count / size),
        f"{statistics.mean(each.held_out for each in relative):.3f}",
        "" if count == size else f"{by_pool[worst].held_out()} ({worst})",
        f"{statistics.mean(each.noise() for each in by_pool.values()):.3f}",
        f"{statistics.mean(each.own for each in relative):.3f}",
        f"{statistics.mean(kl for each in by_pool.values() for kl in each.first_kls):.2f}",
    ]


def by_rows() -> str:
    """Return the table of gains by the number of rows for products."""
    all_pools, rows = pools(ROLLOUTS), [["batch", *HEAD]]
    for rollouts, splits in SPLITS.items():
        size = 1024 * rollouts
        counts = sorted({round(share * size) for share in SHARES} | {n for n in ROWS if n < size})
        found = study(all_pools, rollouts, counts, splits=splits)
        rows += [[steps_of(size), *row(size, count, found[count])] for count in sorted(found)]
    return table(*rows)


def by_policy() -> str:
    """Return the table of held-out gains by policy, for one size of the own batch."""
    counts = (1024, 1365)
    found = study(pools(), 2, counts, splits=20, draws=1)
    rows = [["policy", *(f"{count} of 2048 rows" for count in counts)]]
    rows += [[name, *(found[count][name].held_out() for count in counts)] for name in found[2048]]
    return table(*rows)


def by_kind() -> str:
    """Return the table of parts that are not random rows: 2048 of 8192."""
    kinds: tuple[Kind, ...] = "sequences", "sampled"
    rows = [["part", *HEAD]]
    for kind in kinds:
        found = study(pools(ROLLOUTS), 8, [2048], splits=4, kind=kind)
        rows.append([kind, *row(8192, 2048, found[2048])])
    return table(*rows)


if __name__ == "__main__":
    tables = {"rows": by_rows, "policies": by_policy, "kinds": by_kind}
    page.renew(PAGE, tables, threads=2)
