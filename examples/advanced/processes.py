"""What the processes of one training run share: torchrun starts them, or there is a single one."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from datetime import timedelta
from typing import Any, TypeVar

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import Store, TCPStore  # type: ignore[attr-defined]  # it does not say so
from torch.distributed.rendezvous import rendezvous

__all__ = ["Processes", "leave", "moments"]

_Value = TypeVar("_Value")

_PATIENCE = timedelta(minutes=10)
"""How long a process waits for another."""


class Processes:
    """The processes of a run; alone, everything is this process's own.

    Args:
        device: Where the networks live, "cpu", "cuda", ...: gloo or NCCL serves it.

    Attributes:
        group: Their process group, or None for a single process without torchrun.
        size: How many they are.
        rank: Which of them this is.
        restarted: Whether torchrun has started them again after one was lost.
        launch: Which call of torchrun has started them, first or again; empty without one.
    """

    def __init__(self, device: str) -> None:
        self.group: dist.ProcessGroup | None = None
        if dist.is_torchelastic_launched() and not dist.is_initialized():
            backend = "gloo"
            if device.startswith("cuda"):
                torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
                backend = "nccl"
            rank, size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
            dist.init_process_group(
                backend, store=_meeting(rank, size), rank=rank, world_size=size, timeout=_PATIENCE
            )
        if dist.is_initialized():
            self.group = dist.group.WORLD
        self.size = dist.get_world_size() if self.group else 1
        self.rank = dist.get_rank() if self.group else 0
        restarts = int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"))
        self.restarted = any(self.all(restarts))  # each host counts its own
        self.launch = _launch() if dist.is_torchelastic_launched() else ""

    @property
    def first(self) -> bool:
        """Whether this is the process that writes and prints."""
        return self.rank == 0

    def all(self, own: _Value) -> list[_Value]:
        """Return every process's value, in the order of the ranks."""
        if self.group is None:
            return [own]
        values: list[Any] = [None] * self.size
        dist.all_gather_object(values, own, group=self.group)
        return values

    def of_first(self, make: Callable[[], _Value]) -> _Value:
        """Return what the first process makes; the others wait for it."""
        return self.all(make() if self.first else None)[0]  # type: ignore[return-value]  # the first's

    def seed(self, seed: int, *more: int) -> int:
        """Return a seed of this process's own; the first's is that of a single process."""
        return seed_of(seed, *more, *[self.rank] * (self.rank > 0))


def seed_of(*parts: int) -> int:
    """Return a seed made of several numbers, unlike that of any others."""
    return int(np.random.SeedSequence(parts).generate_state(1)[0])


def leave() -> None:
    """Leave the process group, if there is one, and wait for its threads.

    What still holds the group must be gone, such as the run. A process that ends with threads of
    gloo's can be aborted, where one lets go of its last message late.
    """
    if dist.is_initialized():
        time.sleep(0.1)  # or torch 2.6 may wait for ever for a thread that holds its last message
        dist.destroy_process_group()


def moments(values: Tensor) -> tuple[Any, Any, int]:
    """Return mean, variance and number of values, (B, …), over B."""
    plain = values.cpu().numpy()
    return plain.mean(0), plain.var(0), len(plain)


def _launch() -> str:
    """Return torchrun's name of the run; where it has none, the number of torchrun's process."""
    name = os.environ["TORCHELASTIC_RUN_ID"]
    return name if name != "none" else f"process {os.getppid()}"


def _meeting(rank: int, size: int) -> Store:
    """Return the store at which the processes of this start, and no earlier one, find each other.

    The store that torchrun hands to its processes still holds what those of an earlier start wrote,
    among it their addresses. It serves to say where the first process has opened a new one.

    Raises:
        RuntimeError: If the first process does not come.
    """
    old: Store = next(rendezvous("env://", rank, size))[0]
    if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True":
        return old  # the first process's own, and thus new
    if rank == 0:
        host = os.environ["MASTER_ADDR"]
        store = TCPStore(host, 0, size, is_master=True, wait_for_workers=False)
        old.set("meeting", f"{host} {store.port}")
        return store
    end = time.monotonic() + _PATIENCE.total_seconds()
    while True:
        host, port = old.get("meeting").decode().split()
        try:
            return TCPStore(host, int(port), size, timeout=timedelta(seconds=3))
        except RuntimeError:  # of an earlier start
            if time.monotonic() > end:
                raise
