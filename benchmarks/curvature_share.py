"""How many rows of a batch Fisher-vector products need.

    PYTHONPATH=examples/advanced python benchmarks/curvature_share.py

Prints the table of docs/results/step-quality.md. The gradient is that of the whole own batch, the
products are taken on a random part of it. Every direction is scaled to the same measured KL on the
whole own batch, so that only directions differ.
"""

from __future__ import annotations

import math
import statistics
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal

import torch
import train
import tyro
from real_batches import Pool, pools
from step_case import RADIUS, Case, Gains, Product
from table import steps_of, table
from torch import Tensor

ROLLOUTS = 128  # of each pool
HELD_OUT = 64  # rollouts that judge a step
SPLITS = {2: 4, 8: 8, 20: 2, 64: 1}  # how often a pool is divided, by the own batch's rollouts
SHARES = (0.05, 0.1, 0.25, 0.5)
ROWS = (512, 1024, 2048, 4096, 8192)
DRAWS = 3
Kind = Literal["rows", "sequences", "sampled"]
"""Random rows, all steps of random environments, random rows whose KL is estimated on actions."""


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
        parts, wholes = zip(*self.gains, strict=True)
        return Gains(
            own=sum(each.own for each in parts) / sum(each.own for each in wholes),
            held_out=sum(each.held_out for each in parts) / sum(each.held_out for each in wholes),
        )

    def noise(self) -> float:
        """Return the standard error of the relative held-out gain, from its spread."""
        whole = statistics.mean(each.held_out for _, each in self.gains)
        losses = [(whole.held_out - part.held_out) for part, whole in self.gains]
        return statistics.pstdev(losses) / math.sqrt(max(1, len(losses) - 1)) / whole


def counts(size: int) -> list[int]:
    """Return the numbers of rows to take products on, in order.

    Args:
        size: Of the whole batch.
    """
    rows = {round(share * size) for share in SHARES} | set(ROWS)
    return sorted(each for each in rows if each < size)


def shuffled(pool: Pool, rollouts: int, generator: torch.Generator) -> Pool:
    """Return some of a pool's rollouts, in random order."""
    order = torch.randperm(ROLLOUTS, generator=generator)[:rollouts]
    return replace(
        pool,
        observations=pool.observations[order],
        actions=pool.actions[order],
        advantages=pool.advantages[order],
    )


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
    direction = case.solved(None, 10, product)
    length = math.sqrt(2 * RADIUS / float(direction.dot(product(direction))))
    return case.gains(direction), case.kl(length * direction) / RADIUS


def study(
    all_pools: list[Pool], rollouts: int, splits: int, kind: Kind = "rows", only: int | None = None
) -> list[list[str]]:
    """Return the rows of the table for one size of the own batch.

    Args:
        all_pools: The real policies.
        rollouts: Of the own batch.
        splits: Ways to divide each pool.
        kind: What a part is.
        only: The one number of rows to take products on. None: all of ``counts``.
    """
    found: dict[int, dict[str, Found]] = {}
    for split in range(splits):
        generator = torch.Generator().manual_seed(1000 * rollouts + split)
        for pool in all_pools:
            case = Case(shuffled(pool, rollouts + HELD_OUT, generator), range(rollouts))
            size = len(case.own.advantages)
            orders = [order(kind, size, generator) for _ in range(DRAWS)]
            sampled = kind == "sampled"
            whole = outcome(case, case.product_on(torch.arange(size), sampled=sampled))
            outcomes = [(size, whole)]
            for count in counts(size) if only is None else [only]:
                for rows in orders:
                    product = case.product_on(rows[:count], sampled=sampled)
                    outcomes.append((count, outcome(case, product)))
            for count, (gains, first_kl) in outcomes:
                name = f"{pool.env_id}, {pool.updates} updates"
                here = found.setdefault(count, {}).setdefault(name, Found())
                here.gains.append((gains, whole[0]))
                here.first_kls.append(first_kl)
    return [row(size, count, found[count]) for count in sorted(found)]


def by_policy(all_pools: list[Pool], rollouts: int, shown: list[int], splits: int) -> str:
    """Return the table of held-out gains by policy, for one size of the own batch.

    Args:
        all_pools: The real policies. The rollouts that are not in the own batch judge the step.
        rollouts: Of the own batch.
        shown: Numbers of rows to take products on.
        splits: Ways to divide each pool.
    """
    rows = [["policy", *(f"{count} of {1024 * rollouts} rows" for count in shown)]]
    for pool in all_pools:
        found = {count: Found() for count in shown}
        for split in range(splits):
            generator = torch.Generator().manual_seed(7000 * rollouts + split)
            everything = torch.randperm(len(pool.advantages), generator=generator)
            case = Case(pool, everything.tolist()[:rollouts])
            size = len(case.own.advantages)
            whole = case.gains(case.solved(None, 10))
            for count in shown:
                chosen = torch.randperm(size, generator=generator)[:count]
                part = case.gains(case.solved(None, 10, case.product_on(chosen)))
                found[count].gains.append((part, whole))
        kept = [f"{each.relative().held_out:.3f} ± {each.noise():.3f}" for each in found.values()]
        rows.append([f"{pool.env_id}, {pool.updates} updates", *kept])
    return table(*rows)


def row(size: int, count: int, by_pool: dict[str, Found]) -> list[str]:
    """Return one row of the table.

    Args:
        size: Of the own batch.
        count: How many of its rows the products were taken on.
        by_pool: What they gained, by the real policy's name.
    """
    relative = {name: each.relative() for name, each in by_pool.items()}
    worst = min(relative, key=lambda name: relative[name].held_out)
    gain = relative[worst].held_out
    first_kls = [kl for each in by_pool.values() for kl in each.first_kls]
    return [
        steps_of(size),
        steps_of(count),
        f"{100 * count / size:.0f} %",
        f"{statistics.mean(each.held_out for each in relative.values()):.3f}",
        "" if count == size else f"{gain:.3f} ± {by_pool[worst].noise():.3f} ({worst})",
        f"{statistics.mean(each.noise() for each in by_pool.values()):.3f}",
        f"{statistics.mean(each.own for each in relative.values()):.3f}",
        f"{statistics.mean(first_kls):.2f}",
    ]


def main(
    folder: Path = Path("runs/pools"),
    splits: dict[int, int] = SPLITS,
    threads: int = 2,
) -> None:
    """Print a table for every size of the own batch, and one of other parts.

    Args:
        folder: Where the pools are kept; missing ones are made.
        splits: How often a pool is divided, by the number of rollouts in the own batch.
        threads: CPU threads of torch.
    """
    torch.set_num_threads(threads)
    all_pools = pools(folder, ROLLOUTS)
    head = ["batch", "rows for products", "share", "held out, mean", "held out, worst real batch"]
    head += ["standard error, mean", "own, mean", "KL / δ of the first trial"]
    for rollouts, count in splits.items():
        print(table(head, *study(all_pools, rollouts, count)), flush=True)
    kinds: list[Kind] = ["sequences", "sampled"]
    count = max(1, splits.get(8, 1) // 2)
    rows = [[kind, *study(all_pools, 8, count, kind, 2048)[0][1:]] for kind in kinds]
    print(table(["part", *head[1:]], *rows))
    print(by_policy(pools(folder), 2, [1024, 1365], 20))


if __name__ == "__main__":
    tyro.cli(main)
