"""PyTorch's distributed wrappers of a policy: what they do during a step, and which cannot be."""

from __future__ import annotations

import functools
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

from trpo_optim.errors import TrustRegionError

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

__all__ = ["unwrapped"]

_LOCK = threading.RLock()


@contextmanager
def unwrapped(group: ProcessGroup | None) -> Iterator[None]:
    """Have ``DistributedDataParallel`` run its module and nothing else, until the step ends.

    Its own forward prepares for a ``backward()`` that never comes, and sends buffers and sometimes
    the order of its buckets, while ranks may make more or fewer evaluations. The optimizer reduces
    by itself.

    Args:
        group: The optimizer's.

    Yields:
        Nothing.

    Raises:
        TrustRegionError: From the policy's forward: if DDP wraps it and the optimizer has no group,
            or if FSDP has sharded it.
    """
    with ExitStack() as stack:
        if dist.is_available() and dist.is_initialized():
            stack.enter_context(
                _other(DistributedDataParallel, "forward", _run_replica).within(group)
            )
            for name in ("FSDPModule", "FullyShardedDataParallel"):
                if wrapper := getattr(sys.modules.get("torch.distributed.fsdp"), name, None):
                    call = _other(wrapper, "__call__", _refuse)  # which comes before its hooks
                    stack.enter_context(call.within(group))
        yield


class _Other:
    """Another method of all modules of a class, for the threads that are within a step.

    It is set on the class, since a step does not know which modules its closure calls, and hooks
    that come and go would have compiled modules compiled again at every step.
    """

    def __init__(self, wrapper: Any, name: str, method: Callable[..., Any]) -> None:
        own = vars(wrapper).get(name)
        groups: dict[int, ProcessGroup | None] = {}

        def chosen(module: Any, *args: Any, **named: Any) -> Any:
            if (thread := threading.get_ident()) in groups:
                return method(module, groups[thread], *args, **named)
            if own is not None:
                return own(module, *args, **named)
            return getattr(super(wrapper, module), name)(*args, **named)

        self._chosen: Any = torch.compiler.disable(chosen, recursive=False)
        self._wrapper, self._name, self._own, self._groups = wrapper, name, own, groups

    @contextmanager
    def within(self, group: ProcessGroup | None) -> Iterator[None]:
        """Be within a step of the group in this thread."""
        with _LOCK:
            self._groups[threading.get_ident()] = group
            setattr(self._wrapper, self._name, self._chosen)
        try:
            yield
        finally:
            with _LOCK:
                del self._groups[threading.get_ident()]
                if not self._groups and self._own is None:
                    delattr(self._wrapper, self._name)
                elif not self._groups:
                    setattr(self._wrapper, self._name, self._own)


def _other(wrapper: Any, name: str, method: Callable[..., Any]) -> _Other:
    with _LOCK:
        return _made(wrapper, name, method)


_made = functools.cache(_Other)


def _run_replica(
    module: DistributedDataParallel, group: ProcessGroup | None, *args: Any, **named: Any
) -> Any:
    if group is None and dist.get_world_size(module.process_group) > 1:
        raise TrustRegionError(
            "The policy is wrapped in DistributedDataParallel, and the optimizer has no "
            "process_group: every rank would take a step of its own. Pass "
            "process_group=ddp.process_group (or torch.distributed.group.WORLD)."
        )
    return module.module(*args, **named)


def _refuse(module: Any, group: ProcessGroup | None, *args: Any, **named: Any) -> Any:  # noqa: ARG001 (called as others are)
    raise TrustRegionError(
        f"The policy holds a {type(module).__name__}, sharded by FSDP: its parameters are put "
        "together outside of autograd, which cannot differentiate them twice. Keep a whole copy on "
        "every rank, plain or in DistributedDataParallel, and pass process_group; or shard it by "
        "tensor parallelism (parallelize_module)."
    )
