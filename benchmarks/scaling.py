"""What a step costs on several processes: traffic, time on this machine, and a model beyond it.

    make bench-scaling

Writes docs/results/scaling.md. Processes of one thread each are joined by gloo. Those that a round
does not need sleep.
"""

from __future__ import annotations

import functools
import math
import os
import platform
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
import tyro
from scene import DAMPING, ITERATIONS, RADIUS, Scene
from table import table
from timing import Job, Times, taken_in_turn
from torch.distributed import FileStore  # type: ignore[attr-defined]  # it does not say so

from trpo_optim import TrustRegionOptimizer

SAMPLES = 40_960
"""Of all ranks together, for strong scaling; of each, for weak."""


@dataclass(frozen=True)
class Settings:
    """How the benchmark runs."""

    rounds: int = 7
    """timed rounds"""
    folder: Path = Path("docs/results")
    """where scaling.md goes"""


@dataclass(frozen=True)
class Link:
    """A network: seconds to start a message, and bytes a second of one process."""

    name: str
    latency: float
    bandwidth: float

    def ring(self, ranks: int, size: float) -> float:
        """Return the seconds of one all-reduce of so many bytes: latency by a tree, then a ring."""
        if ranks == 1:
            return 0.0
        return 2 * math.ceil(math.log2(ranks)) * self.latency + (
            2 * (ranks - 1) / ranks * size / self.bandwidth
        )

    def step(self, ranks: int, parameters: float, products: int = ITERATIONS) -> float:
        """Return the seconds that a step waits for the network."""
        vectors, rows = products + 1, 4
        row = 8 * 7 * ranks
        return vectors * self.ring(ranks, 4 * (parameters + ranks)) + rows * self.ring(ranks, row)


LINKS = (
    Link("10 Gbit/s Ethernet", 30e-6, 1.25e9),
    Link("400 Gbit/s InfiniBand", 5e-6, 50e9),
    Link("NVLink (450 GB/s)", 3e-6, 450e9),
)
"""Nominal figures, not measured here."""


def updates(rank: int, group: Any, scene: Scene, *, weak: bool, **how: Any) -> Job:
    """Return this rank's update: of its share of the samples, or of as many more."""
    size = dist.get_world_size(group) if group is not None else 1
    part = SAMPLES if weak else SAMPLES // size
    rows = slice(part * rank, part * (rank + 1))
    settings = {"max_kl": RADIUS, "damping": DAMPING, "cg_tolerance": 0.0, **how}
    optimizer = TrustRegionOptimizer(scene.parameters, process_group=group, **settings)
    closure = scene.closure(rows, third=True)
    return Job(lambda: optimizer.step(closure), scene.reset)


def together(ranks: int, rank: int, job: Callable[[], Job]) -> Job:
    """Have only the first ranks run a job, all having come to it."""
    own = job() if rank < ranks else Job(lambda: None)

    def prepare() -> None:
        own.prepare()
        dist.barrier()

    return Job(own.run, prepare)


def timed(rank: int, size: int, folder: str, rounds: int) -> None:
    """Be a rank of the measurement; the first one saves the times."""
    torch.set_num_threads(1)
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    dist.init_process_group(
        "gloo", store=FileStore(f"{folder}/store", size), rank=rank, world_size=size
    )
    jobs: dict[str, Job] = {}
    for hidden in (64, 256):
        strong = Scene(hidden, SAMPLES)
        weak = Scene(hidden, SAMPLES * size)
        for ranks in (1, size):
            group = dist.group.WORLD if ranks > 1 else None
            for name, scene in (("strong", strong), ("weak", weak)):
                make = functools.partial(updates, rank, group, scene, weak=name == "weak")
                jobs[f"{hidden} {name} {ranks}"] = together(ranks, rank, make)
    for length in (1_000, 1_000_000, 10_000_000):
        buffer = torch.zeros(length)
        send = functools.partial(dist.all_reduce, buffer)
        jobs[f"all-reduce {length}"] = together(size, rank, functools.partial(Job, send))
    times = taken_in_turn(jobs, rounds)
    if rank == 0:
        torch.save({name: each.seconds for name, each in times.items()}, f"{folder}/times.pt")
    dist.destroy_process_group()


def traffic(rank: int, size: int, folder: str) -> None:
    """Be a rank of a step whose collectives are counted."""
    torch.set_num_threads(1)
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    dist.init_process_group(
        "gloo", store=FileStore(f"{folder}/store", size), rank=rank, world_size=size
    )
    sizes: list[int] = []
    whole = dist.all_reduce

    def all_reduce(tensor: torch.Tensor, **named: Any) -> Any:
        sizes.append(tensor.numel() * tensor.element_size())
        return whole(tensor, **named)

    setattr(dist, "all_reduce", all_reduce)  # noqa: B010 (typed as the function)
    rows = []
    for hidden in (64, 256):
        scene = Scene(hidden, SAMPLES)
        for how in ({}, {"cg_iterations": 5}, {"mode": "vanilla", "damping": None, "max_kl": 0.01}):
            sizes.clear()
            updates(rank, dist.group.WORLD, scene, weak=False, **how).run()
            count = sum(each.numel() for each in scene.parameters)
            rows.append((count, how, len(sizes), sum(sizes)))
            scene.reset()
    if rank == 0:
        torch.save(rows, f"{folder}/traffic.pt")
    dist.destroy_process_group()


def spawned(function: Callable[..., None], size: int, name: str, *args: Any) -> Any:
    """Run ranks, and return what the first one saved."""
    with tempfile.TemporaryDirectory() as folder:
        mp.spawn(function, (size, folder, *args), nprocs=size)  # type: ignore[attr-defined, no-untyped-call]  # it does not say so
        return torch.load(f"{folder}/{name}.pt")


def scaling_table(times: dict[str, Times]) -> str:
    """Return the table of weak and strong scaling."""
    rows = [["network", "", "1 rank (ms)", "2 ranks (ms)", "ratio of 2 ranks to 1"]]
    for hidden in (64, 256):
        for name, meaning in (
            ("strong", f"{SAMPLES} samples in total"),
            ("weak", f"{SAMPLES} samples per rank"),
        ):
            one, two = (times[f"{hidden} {name} {ranks}"] for ranks in (1, 2))
            rows.append(
                [
                    f"17–{hidden}–{hidden}–6",
                    meaning,
                    f"{1000 * one.median:.1f}",
                    f"{1000 * two.median:.1f}",
                    two.over(one),
                ]
            )
    return table(*rows)


def traffic_table(rows: list[tuple[int, dict[str, Any], int, int]], ranks: int) -> str:
    """Return the table of collectives and bytes, beside what the design says."""
    found = [["parameters", "step", "collectives", "bytes", "by the model"]]
    for count, how, collectives, size in rows:
        products = 0 if how.get("mode") == "vanilla" else how.get("cg_iterations", ITERATIONS)
        small = collectives - products - 1
        model = (products + 1) * 4 * (count + ranks)
        name = "vanilla" if how.get("mode") else f"trpo, {products} products"
        found.append(
            [str(count), name, f"{products + 1} + {small}", f"{size:,}", f"{model:,} + tables"]
        )
    return table(*found)


def model_table() -> str:
    """Return what the model says of many ranks and parameters."""
    rows = [["parameters", "ranks", *(link.name for link in LINKS), "vectors on each rank"]]
    for parameters in (1e6, 1e7, 1e8, 1e9):
        for ranks in (8, 64, 1024):
            waits = [f"{1000 * link.step(ranks, parameters):.3g} ms" for link in LINKS]
            held = (ITERATIONS + 6) * 4 * parameters / 1e9
            rows.append(
                [f"{parameters:.0e}".replace("e+0", "e"), str(ranks), *waits, f"{held:.3g} GB"]
            )
    return table(*rows)


PAGE = """# Many ranks

Written by `make bench-scaling` on {cores} CPU cores ({machine}), torch {torch}, gloo over loopback.

## What is sent

A step performs one all-reduce of parameter size for the gradient and one per product, in float32 or
higher precision. It also sends {rows} small tables: the state of all ranks before the step, the
values at the start and at the trial, and the result of all ranks. Each further trial sends one more
table. The figures were counted on two ranks. Collectives are vectors plus tables.

{traffic}

Every vector ends with one number per rank, which reports a failure. Every table has at most 7
numbers per rank. Short texts follow if something is wrong, if a rank has no samples, or if ranks
use different engines.

## Two ranks on two cores

The times are medians over {rounds} rounds. The jobs run in turns. Brackets hold the quartiles of
the rounds' own ratios. Each rank has one thread. Steps have ten products, with the third value.

{scaling}

An all-reduce takes {small:.2f} ms for 4 kB, {middle:.1f} ms for 4 MB, {large:.0f} ms for 40 MB.

## What the model says

An all-reduce of B bytes over P ranks takes 2 ⌈log₂ P⌉ α + 2 (P − 1)/P · B/β: the latency of a tree
and the bandwidth of a ring. The table shows how long a step of ten products waits for the network.
The figures are nominal, not measured here. The latency α is 30 µs for the Ethernet, 5 µs for
InfiniBand and 3 µs for NVLink. The bandwidth β is named in the table.

{model}

This time does not depend on the batch. With enough samples per rank, the computation takes longer
than the communication. A product on N samples of a network with n weights takes about 8 N n
floating-point operations, and sends 8 bytes per weight. Both grow with n, so the number of samples
that is enough does not depend on n. At 10¹³ operations per second, it is {over_ethernet:.0f} on the
Ethernet and {over_infiniband:.0f} on the InfiniBand of the table.

Memory is the limit. A solve of ten products keeps ten directions, and a rank holds about sixteen
vectors of parameter size. So 10⁹ parameters fill a card of 80 GB. Tensor parallelism shards weights
and activations, but not these vectors. A larger policy needs fewer directions or another solver.

## More curvature per byte

A product sends the same bytes for any number of samples. So products on a tenth of the batch
(`curvature=`) save computation, but no bytes. Fewer products save both. Five products send a little
more than half of the bytes of ten, and gain almost as much ([step quality](step-quality.md)).
"""


def _samples(link: Link) -> float:
    """Return how many samples a rank it takes for a product to outlast its all-reduce."""
    speed, operations, size = 1e13, 8.0, 8.0
    return size / link.bandwidth / (operations / speed)


def main(settings: Settings) -> None:
    """Measure, and write the page.

    Args:
        settings: How long to measure.
    """
    ranks = 2
    saved = spawned(timed, ranks, "times", settings.rounds)
    times = {name: Times(seconds) for name, seconds in saved.items()}
    rows = spawned(traffic, ranks, "traffic")
    small, middle, large = (
        1000 * times[f"all-reduce {length}"].median for length in (1_000, 1_000_000, 10_000_000)
    )
    page = PAGE.format(
        cores=os.cpu_count(),
        machine=platform.machine(),
        torch=torch.__version__,
        rows=4,
        rounds=settings.rounds,
        traffic=traffic_table(rows, ranks),
        scaling=scaling_table(times),
        small=small,
        middle=middle,
        large=large,
        model=model_table(),
        over_ethernet=_samples(LINKS[0]),
        over_infiniband=_samples(LINKS[1]),
    )
    (settings.folder / "scaling.md").write_text(page, "utf-8")


if __name__ == "__main__":
    main(tyro.cli(Settings))
