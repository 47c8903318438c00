"""Policies that FSDP2 shards, the same policies in one process, and steps of both."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from problems import Problem
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.distributions import Distribution, Independent, Normal
from torch.utils.checkpoint import checkpoint
from wrapped_steps import closure_on

from trpo_optim import StepReport

SAMPLES = 64


class Block(nn.Module):
    """A layer, all of it trained, or frozen with a small trained adapter beside it."""

    def __init__(self, inputs: int, outputs: int, *, adapter: bool) -> None:
        super().__init__()
        self.layer = nn.Linear(inputs, outputs).requires_grad_(not adapter)
        self.down = nn.Linear(inputs, 1, bias=False) if adapter else None
        self.up = nn.Linear(1, outputs, bias=False) if adapter else None

    def forward(self, inputs: Tensor) -> Tensor:
        outputs: Tensor = self.layer(inputs)
        if self.down is not None and self.up is not None:
            outputs = outputs + self.up(self.down(inputs))
        return outputs.tanh()


class Core(nn.Module):
    """What ``fully_shard`` gets: it returns tensors. One parameter has a single element."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        adapter = kind == "adapters"
        self.blocks = nn.ModuleList([Block(4, 7, adapter=adapter), Block(7, 7, adapter=adapter)])
        self.mean = nn.Linear(7, 2).requires_grad_(not adapter)
        self.log_std = nn.Parameter(torch.full((1,), -0.3))
        self.checkpointed = kind == "checkpoints"
        if kind == "one number":  # of which the first rank has all
            self.requires_grad_(False)
            self.log_std.requires_grad_(True)

    def forward(self, observations: Tensor) -> tuple[Tensor, Tensor]:
        hidden: Any = observations
        for block in self.blocks:
            if self.checkpointed:
                hidden = checkpoint(block, hidden, use_reentrant=False)
            else:
                hidden = block(hidden)
        mean = self.mean(hidden)
        return mean, self.log_std.exp() + 0 * mean


class Policy(nn.Module):
    """A Gaussian policy around a core."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.core = Core(kind)

    def forward(self, observations: Tensor) -> Distribution:
        return Independent(Normal(*self.core(observations)), 1)


def task_of(kind: str = "all parameters", dtype: torch.dtype = torch.float64) -> Problem:
    """Return what every rank builds, before anything is sharded."""
    torch.manual_seed(0)
    return Problem(Policy(kind).to(dtype), torch.randn(SAMPLES, 4, dtype=dtype))


def core_of(task: Problem) -> Any:
    """Return what ``fully_shard`` gets of a task's policy."""
    return task.policy.core


def sharded(task: Problem, **options: Any) -> Problem:
    """Shard every block of a task's policy, and the core around them."""
    for block in core_of(task).blocks:
        fully_shard(block, **options)
    fully_shard(core_of(task), **options)
    return task


def half(task: Problem, rank: int) -> Any:
    """Return the closure of a rank's half of the batch."""
    return closure_on(task, slice(32 * rank, 32 * (rank + 1)))


def steps_on(
    task: Problem, sizes: Sequence[int], start: int, *, count: int = 2, **settings: Any
) -> list[StepReport]:
    """Take steps on rows of the batch, in micro-batches of some sizes."""
    optimizer = task.optimizer(**settings)
    reports = []
    for _ in range(count):
        begin, closures = start, []
        for size in sizes:
            closures.append(closure_on(task, slice(begin, begin + size)))
            begin += size
        reports.append(optimizer.step(closures, weights=list(sizes)))
    return reports


def alone(kind: str, dtype: torch.dtype, **settings: Any) -> tuple[Tensor, Tensor, StepReport]:
    """Return parameters before and after two steps of one process, and the second report."""
    task = task_of(kind, dtype)
    before = vector_of(task.policy)
    report = steps_on(task, [SAMPLES], 0, **settings)[-1]
    return before, vector_of(task.policy), report


def vector_of(policy: nn.Module) -> Tensor:
    """Return a copy of the trained parameters, whole."""
    pieces = [
        getattr(each, "full_tensor", lambda each=each: each)()
        for each in policy.parameters()
        if each.requires_grad
    ]
    return torch.cat([each.detach().reshape(-1) for each in pieces]).clone()


def together(
    rank: int,
    kind: str,
    cut: Sequence[Sequence[int]],
    dtype: torch.dtype,
    options: dict[str, Any],
    settings: dict[str, Any],
) -> tuple[Tensor, StepReport]:
    """Return the parameters after two steps on this rank's share, and the second report."""
    task = sharded(task_of(kind, dtype), **options)
    start = sum(map(sum, cut[:rank]))
    reports = steps_on(task, cut[rank], start, process_group=dist.group.WORLD, **settings)
    return vector_of(task.policy), reports[-1]
