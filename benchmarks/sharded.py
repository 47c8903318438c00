"""What a step costs with a policy in FSDP, on two processes of one thread each, joined by gloo.

    PYTHONPATH=. python benchmarks/sharded.py

Prints the table of docs/how-to/many-processes.md.
"""

from __future__ import annotations

import os
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed import FileStore  # type: ignore[attr-defined]  # it does not say so
from torch.distributed.fsdp import fully_shard
from torch.distributions import Categorical
from torch.multiprocessing.spawn import spawn

from trpo_optim import TrustRegionOptimizer, frozen, mean_kl
from trpo_optim.distributed.fsdp import RanksInStep

SIZES = ((64, 4, 256), (256, 8, 512))
"""Width, blocks, and samples of each rank."""

ROUNDS, GRADIENTS = 5, 10
"""The round with the median ratio counts. In each, the gradients are timed next to the step."""


class Network(nn.Module):
    """Residual blocks, and logits of eight actions."""

    def __init__(self, width: int, blocks: int) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(
            nn.Sequential(nn.Linear(width, 4 * width), nn.Tanh(), nn.Linear(4 * width, width))
            for _ in range(blocks)
        )
        self.head = nn.Linear(width, 8)

    def forward(self, inputs: Tensor) -> Tensor:
        """Return the logits."""
        for block in self.blocks:
            inputs = inputs + block(inputs)
        logits: Tensor = self.head(inputs)
        return logits


def closure_of(network: nn.Module, inputs: Tensor) -> Callable[[], tuple[Tensor, Tensor]]:
    """Return a closure whose old policy is the present one."""
    with torch.no_grad():
        old = frozen(Categorical(logits=network(inputs)))
    actions, advantages = old.sample(), torch.randn(len(inputs))

    def closure() -> tuple[Tensor, Tensor]:
        new = Categorical(logits=network(inputs))
        ratio = (new.log_prob(actions) - old.log_prob(actions)).exp()
        return -(ratio * advantages).mean(), mean_kl(old, new)

    return closure


def measured(rank: int, store: str) -> None:
    """Be a rank of the measurement; the first one prints a row for each size."""
    torch.set_num_threads(1)
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    dist.init_process_group("gloo", store=FileStore(store, 2), rank=rank, world_size=2)
    said = [0.0]
    usual: Any = RanksInStep._say

    def timed(self: Any, own: Any) -> None:
        start = time.perf_counter()
        usual(self, own)
        said[0] += time.perf_counter() - start

    setattr(RanksInStep, "_say", timed)  # noqa: B010 (typed as the method)
    for width, blocks, samples in SIZES:
        torch.manual_seed(0)
        network = Network(width, blocks)
        for block in network.blocks:
            fully_shard(block)
        fully_shard(network)
        optimizer = TrustRegionOptimizer(
            network.parameters(), process_group=dist.group.WORLD, cg_tolerance=0.0
        )
        count = sum(each.numel() for each in network.parameters())
        inputs = torch.randn(samples, width)
        optimizer.step(closure_of(network, inputs))  # the first one compares more
        rounds = []
        for _ in range(ROUNDS):
            closure = closure_of(network, inputs)
            start = time.perf_counter()
            for _ in range(GRADIENTS):
                closure()[0].backward()
            gradient = (time.perf_counter() - start) / GRADIENTS
            optimizer.zero_grad()
            closure, said[0] = closure_of(network, inputs), 0.0
            start = time.perf_counter()
            report = optimizer.step(closure)
            step = time.perf_counter() - start
            assert report.fisher_products == 10
            rounds.append((step / gradient, step, gradient, said[0] / step))
        ratio, step, gradient, messages = sorted(rounds)[ROUNDS // 2]
        if rank == 0:
            cells = [f"{count:,}".replace(",", " "), blocks + 1, f"{step:.2f} s"]
            cells += [f"{gradient:.2f} s", f"{ratio:.1f}", f"{messages:.0%}"]
            print("|", " | ".join(map(str, cells)), "|", flush=True)
    dist.destroy_process_group()


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder:
        spawn(measured, (str(Path(folder) / "store"),), nprocs=2)
