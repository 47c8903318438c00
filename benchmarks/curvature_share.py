"""How many rows of a batch Fisher-vector products need.

    PYTHONPATH=examples/advanced python benchmarks/curvature_share.py

Writes the other tables of docs/results/step-quality.md. The gradient is that of the whole own
batch, the products are taken on a random part of it. Every direction is scaled to the same measured
KL on the whole own batch, so that only directions differ.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import product
from typing import Literal

import page
import pandas as pd
import torch
import train
from real_batches import Pool, pools
from scene import solved
from step_case import Case, Gains
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


def order(kind: Kind, size: int, generator: torch.Generator) -> Tensor:
    """Return an order of the own rows; a part is its beginning.

    ``"sequences"`` keeps what one environment did in a rollout together.
    """
    if kind != "sequences":
        return torch.randperm(size, generator=generator)
    environments = train.Args.num_envs
    steps = train.Args.batch_size // environments
    rows = torch.arange(size).reshape(-1, steps, environments).transpose(1, 2).reshape(-1, steps)
    return rows[torch.randperm(len(rows), generator=generator)].flatten()


def study(
    policies: list[Pool], rollouts: int, counts: Sequence[int], splits: int, draws: int, kind: Kind
) -> pd.DataFrame:
    """Return what each number of rows for products gained, over the gains of the products on all.

    By number of rows and policy, these are ``held_out``, the mean held-out gain over all ways to
    split a pool and all draws of a part of the own batch, and ``noise``, its standard error;
    ``own``, the own gain; and ``first_kl``, the KL, over the radius, of the length that the part's
    products gave. All rows come first.
    """
    trials, size = [], 1024 * rollouts
    for pool, split in product(policies, range(splits)):
        generator = torch.Generator().manual_seed(1000 * rollouts + split)
        mixed = torch.randperm(len(pool.advantages), generator=generator).tolist()
        case = Case(pool, mixed[:rollouts], mixed[rollouts:][:HELD_OUT])
        orders = [order(kind, size, generator) for _ in range(draws)]
        parts = [torch.arange(size), *(each[:count] for count in counts for each in orders)]
        whole: Gains | None = None
        for rows in parts:
            curvature = case.own.model(rows, sampled=kind == "sampled", gradient=False)
            direction = solved(curvature.product, case.uphill).x
            gains = case.gains(direction)
            whole = whole or gains
            lost = whole.held_out - gains.held_out
            first_kl = case.first_kl(direction, curvature.product)
            trials.append((len(rows), pool.name, *gains, lost, first_kl))
    columns = ["rows", "policy", *Gains._fields, "lost", "first_kl"]
    by_part = pd.DataFrame(trials, columns=columns).groupby(["rows", "policy"], sort=False)
    mean, noise = by_part.mean(), by_part["lost"].sem().fillna(0.0)  # one trial has no spread
    unit = mean.loc[size]
    return mean.assign(
        held_out=mean["held_out"].div(unit["held_out"], level="policy"),
        noise=noise.div(unit["held_out"], level="policy"),
        own=mean["own"].div(unit["own"], level="policy"),
    )


def with_noise(gain: pd.Series[float]) -> str:
    """Return a held-out gain with its standard error."""
    return f"{gain['held_out']:.3f} ± {gain['noise']:.3f}"


def row(size: int, count: int, by_policy: pd.DataFrame) -> dict[str, str]:
    """Return the table's row of products on so many rows of a batch of a size."""
    worst, mean = by_policy["held_out"].idxmin(), by_policy.mean()
    of_worst = f"{with_noise(by_policy.loc[worst])} ({worst})"
    return {
        "rows for products": steps_of(count),
        "share": percent(count / size),
        "held out, mean": f"{mean['held_out']:.3f}",
        "held out, worst real batch": "" if count == size else of_worst,
        "standard error, mean": f"{mean['noise']:.3f}",
        "own, mean": f"{mean['own']:.3f}",
        "KL / δ of the first trial": f"{mean['first_kl']:.2f}",
    }


def by_rows() -> str:
    """Return the table of gains by the number of rows for products."""
    table = []
    for rollouts, splits in SPLITS.items():
        size = 1024 * rollouts
        counts = sorted({round(share * size) for share in SHARES} | {n for n in ROWS if n < size})
        found = study(pools(ROLLOUTS), rollouts, counts, splits, 3, "rows")
        table += [
            {"batch": steps_of(size), **row(size, count, found.loc[count])}
            for count in (*counts, size)
        ]
    return records(table)


def by_policy() -> str:
    """Return the table of held-out gains by policy, for one size of the own batch."""
    counts, policies = (1024, 1365), pools()
    found = study(policies, 2, counts, 20, 1, "rows")
    return records(
        {"policy": each.name}
        | {f"{count} of 2048 rows": with_noise(found.loc[count, each.name]) for count in counts}
        for each in policies
    )


def by_kind() -> str:
    """Return the table of parts that are not random rows: 2048 of 8192."""
    kinds: tuple[Kind, ...] = "sequences", "sampled"
    found = {kind: study(pools(ROLLOUTS), 8, [2048], 4, 3, kind).loc[2048] for kind in kinds}
    return records({"part": kind, **row(8192, 2048, found[kind])} for kind in kinds)


if __name__ == "__main__":
    tables = {"rows": by_rows, "policies": by_policy, "kinds": by_kind}
    page.renew(PAGE, tables, threads=2)
