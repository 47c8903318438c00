"""How many rows of a batch Fisher-vector products need.

    PYTHONPATH=examples/advanced python benchmarks/curvature_share.py

Writes the other tables of docs/results/step-quality.md. The gradient is that of the whole own
batch, the products are taken on a random part of it. Every direction is scaled to the same measured
KL on the whole own batch, so that only directions differ.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from typing import Literal, NamedTuple

import numpy as np
import page
import torch
import train
from real_batches import Pool, pools
from step_case import Case
from step_quality import PAGE
from table import percent, records, steps_of
from torch import Tensor

ROLLOUTS = 128  # of each pool
HELD_OUT = 64  # rollouts that judge a step
SPLITS = {2: 4, 8: 8, 20: 2, 64: 1}
"""How often a pool is divided, by the own batch's rollouts."""
SHARES = (0.05, 0.1, 0.25, 0.5)
ROWS = (512, 1024, 2048, 4096, 8192)
Kind = Literal["rows", "sequences", "sampled"]
"""Random rows, all steps of random environments, random rows whose KL is estimated on actions."""


class Relative(NamedTuple):
    """What one part of one real batch gained, over the gains of the products on all rows.

    Attributes:
        held_out: The held-out gain, the mean over all splits and draws.
        noise: Its standard error, from its spread.
        own: The own gain.
        first_kl: The KL, over the radius, of the length that the part's products gave.
    """

    held_out: float
    noise: float
    own: float
    first_kl: float

    def __str__(self) -> str:
        """The held-out gain."""
        return f"{self.held_out:.3f} ± {self.noise:.3f}"


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


def study(
    pool: Pool, rollouts: int, counts: Sequence[int], splits: int, draws: int, kind: Kind = "rows"
) -> dict[int, Relative]:
    """Return what each number of rows for products gained.

    Args:
        pool: The real policy.
        rollouts: Of the own batch.
        counts: Numbers of its rows to take products on. All rows come first.
        splits: Ways to divide the pool.
        draws: Parts of each own batch.
        kind: What a part is.
    """
    found: dict[int, list[list[float]]] = defaultdict(list)
    for split in range(splits):
        generator = torch.Generator().manual_seed(1000 * rollouts + split)
        mixed = torch.randperm(len(pool.advantages), generator=generator).tolist()
        case = Case(pool, mixed[:rollouts], mixed[rollouts:][:HELD_OUT])
        size = len(case.own.advantages)
        orders = [order(kind, size, generator) for _ in range(draws)]
        parts = [torch.arange(size), *(each[:count] for count in counts for each in orders)]
        whole: list[float] = []
        for rows in parts:
            product = case.product_on(rows, sampled=kind == "sampled")
            direction = case.solved(product=product)
            gains = list(case.gains(direction))
            whole = whole or gains
            found[len(rows)].append([*gains, *whole, case.first_kl(direction, product)])
    return {count: _relative(np.array(trials)) for count, trials in found.items()}


def _relative(trials: np.ndarray) -> Relative:
    own, held_out, whole_own, whole_held_out, first_kl = trials.mean(0)
    spread = float((trials[:, 3] - trials[:, 1]).std() / max(1, len(trials) - 1) ** 0.5)
    noise = spread / whole_held_out
    return Relative(held_out / whole_held_out, noise, own / whole_own, first_kl)


def row(size: int, count: int, by_policy: dict[str, Relative]) -> dict[str, str]:
    """Return the table's row of products on so many rows of a batch of a size."""
    worst = min(by_policy, key=lambda name: by_policy[name].held_out)
    held_out, noise, own, first_kl = np.mean(list(by_policy.values()), 0)
    return {
        "rows for products": steps_of(count),
        "share": percent(count / size),
        "held out, mean": f"{held_out:.3f}",
        "held out, worst real batch": "" if count == size else f"{by_policy[worst]} ({worst})",
        "standard error, mean": f"{noise:.3f}",
        "own, mean": f"{own:.3f}",
        "KL / δ of the first trial": f"{first_kl:.2f}",
    }


def by_rows() -> str:
    """Return the table of gains by the number of rows for products."""
    table = []
    for rollouts, splits in SPLITS.items():
        size = 1024 * rollouts
        counts = sorted({round(share * size) for share in SHARES} | {n for n in ROWS if n < size})
        found = {each.name: study(each, rollouts, counts, splits, 3) for each in pools(ROLLOUTS)}
        for count in (*counts, size):
            here = {name: each[count] for name, each in found.items()}
            table.append({"batch": steps_of(size), **row(size, count, here)})
    return records(table)


def by_policy() -> str:
    """Return the table of held-out gains by policy, for one size of the own batch."""
    counts, table = (1024, 1365), []
    for pool in pools():
        found = study(pool, 2, counts, 20, 1)
        cells = {f"{count} of 2048 rows": found[count] for count in counts}
        table.append({"policy": pool.name, **cells})
    return records(table)


def by_kind() -> str:
    """Return the table of parts that are not random rows: 2048 of 8192."""
    kinds: tuple[Kind, ...] = "sequences", "sampled"
    table = []
    for kind in kinds:
        found = {each.name: study(each, 8, [2048], 4, 3, kind)[2048] for each in pools(ROLLOUTS)}
        table.append({"part": kind, **row(8192, 2048, found)})
    return records(table)


if __name__ == "__main__":
    tables = {"rows": by_rows, "policies": by_policy, "kinds": by_kind}
    page.renew(PAGE, tables, threads=2)
