"""What a step costs on two processes: traffic, time, and a policy in FSDP.

    make bench-scaling

Writes the tables of docs/results/scaling.md, and that of docs/how-to/many-processes.md on FSDP.
Processes of one thread each are joined by gloo.
"""

from __future__ import annotations

import os
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any
from unittest import mock

import page
import torch
import torch.distributed as dist
from costly_networks import Discrete
from scene import ITERATIONS, Scene, mlp
from table import percent, records, steps_of, table
from timing import Job, over, taken_in_turn
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.multiprocessing.spawn import spawn

from trpo_optim import TrustRegionOptimizer
from trpo_optim.distributed.fsdp import RanksInStep

RANKS, ROUNDS, SAMPLES = 2, 7, 40_960
HIDDEN = (64, 256)
STEPS: dict[str, tuple[int, dict[str, Any]]] = {
    "trpo, 10 products": (ITERATIONS, {}),
    "trpo, 5 products": (5, {"cg_iterations": 5}),
    "vanilla": (0, {"mode": "vanilla", "damping": None, "lr": 1e-3}),
}
"""By name: the products of a step, and what the optimizer is given."""
SHARDED = ((64, 4, 256), (256, 8, 512))
"""Width and blocks of a policy in FSDP, and the samples of each rank."""


def on_ranks(measure: Callable[[], str]) -> str:
    """Return the table that every rank makes and the first one hands over."""
    with tempfile.TemporaryDirectory() as folder:
        spawn(_be_a_rank, (Path(folder), measure), nprocs=RANKS)
        return (Path(folder) / "table").read_text("utf-8")


def _be_a_rank(rank: int, folder: Path, measure: Callable[[], str]) -> None:
    torch.set_num_threads(1)
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    store = f"file://{folder}/store"
    dist.init_process_group("gloo", store, rank=rank, world_size=RANKS)
    found = measure()
    if rank == 0:
        (folder / "table").write_text(found, "utf-8")
    dist.destroy_process_group()


def traffic() -> str:
    """Return the table of collectives and bytes, beside what the design says."""
    rows = [["parameters", "step", "collectives", "bytes", "by the model"]]
    for hidden in HIDDEN:
        scene = mlp(hidden, SAMPLES // RANKS)
        count = sum(each.numel() for each in scene.parameters)
        for name, (products, settings) in STEPS.items():
            job = scene.update(process_group=dist.group.WORLD, **settings)
            job.repeat()  # an optimizer's first step compares engines, too
            with mock.patch.object(dist, "all_reduce", wraps=dist.all_reduce) as collective:
                job.repeat()
            sizes = [call.args[0].nbytes for call in collective.call_args_list]
            vectors = products + 1
            collectives = f"{vectors} + {len(sizes) - vectors}"
            model = f"{vectors * 4 * (count + RANKS):,} + tables"
            rows.append([str(count), name, collectives, f"{sum(sizes):,}", model])
    return table(*rows)


def together(job: Job, ranks: int = RANKS) -> Job:
    """Have the first ranks run a job, once all have come to it. The others sleep."""

    def prepare() -> None:
        job.prepare()
        dist.barrier()

    return Job(job.run if dist.get_rank() < ranks else lambda: None, prepare)


def scaling() -> str:
    """Return the table of weak and strong scaling."""
    rows = [["network", "", "1 rank (ms)", "2 ranks (ms)", "ratio of 2 ranks to 1"]]
    for hidden in HIDDEN:
        jobs = {"one": together(mlp(hidden, SAMPLES).update(), 1)}
        for name, samples in (("in total", SAMPLES // RANKS), ("per rank", SAMPLES)):
            job = mlp(hidden, samples).update(process_group=dist.group.WORLD)
            jobs[f"{SAMPLES} samples {name}"] = together(job)
        one, *others = taken_in_turn(jobs, ROUNDS).values()
        for name, two in zip(list(jobs)[1:], others, strict=True):
            medians = (f"{1000 * median(each):.1f}" for each in (one, two))
            rows.append([f"17–{hidden}–{hidden}–6", name, *medians, over(two, one)])
    return table(*rows)


def sharded() -> str:
    """Return the table of what a step costs with a policy in FSDP."""
    return records(_sharded(*sizes) for sizes in SHARDED)


def _sharded(width: int, depth: int, samples: int) -> dict[str, str]:
    torch.manual_seed(0)
    network = nn.Sequential()
    for _ in range(depth):
        layers = nn.Linear(width, 4 * width), nn.Tanh(), nn.Linear(4 * width, width)
        network.append(nn.Sequential(*layers))
        fully_shard(network[-1])
    network.append(nn.Linear(width, 8))
    fully_shard(network)
    scene = Scene(Discrete(network), torch.randn(samples, width))
    optimizer = TrustRegionOptimizer(
        scene.parameters, process_group=dist.group.WORLD, cg_tolerance=0.0
    )
    closures: list[Any] = []

    def renew() -> None:
        closures[:] = [scene.closure(third=False)]
        network.zero_grad()

    step = Job(lambda: optimizer.step(closures[0]), renew)
    gradient = Job(lambda: closures[0]()[0].backward(), renew)
    times = taken_in_turn({"step": step, "gradient": gradient}, ROUNDS)
    said = 0.0
    usual: Any = RanksInStep._say

    def timed(self: Any, own: Any) -> None:
        nonlocal said
        start = time.perf_counter()
        usual(self, own)
        said += time.perf_counter() - start

    start = time.perf_counter()
    with mock.patch.object(RanksInStep, "_say", timed):
        step.repeat()
    share = said / (time.perf_counter() - start)
    return {
        "parameters": steps_of(sum(each.numel() for each in scene.parameters)),
        "modules in FSDP": str(depth + 1),
        "step": f"{median(times['step']):.3g} s",
        "gradient in FSDP": f"{median(times['gradient']):.3g} s",
        "step, in gradients": over(times["step"], times["gradient"]),
        "share of messages": percent(share),
    }


if __name__ == "__main__":
    tables = {each.__name__: partial(on_ranks, each) for each in (traffic, scaling)}
    page.renew(Path("docs/results/scaling.md"), {"setting": page.setting, **tables})
    fsdp = partial(on_ranks, sharded)
    page.renew(Path("docs/how-to/many-processes.md"), {"sharded": fsdp})
