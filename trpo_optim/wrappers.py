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

from trpo_optim.report import TrustRegionError

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
            stack.enter_context(_other_forward(DistributedDataParallel, _run_replica).within(group))
            if (fsdp := sys.modules.get("torch.distributed.fsdp")) is not None:
                for wrapper in (fsdp.FSDPModule, fsdp.FullyShardedDataParallel):
                    stack.enter_context(_other_forward(wrapper, _refuse).within(group))
        yield


class _OtherForward:
    """Another ``forward`` of all modules of a class, for the threads that are within a step.

    It is set on the class, since a step does not know which modules its closure calls, and hooks
    that come and go would have compiled modules compiled again at every step.
    """

    def __init__(self, wrapper: Any, forward: Callable[..., Any]) -> None:
        own = vars(wrapper).get("forward")
        groups: dict[int, ProcessGroup | None] = {}

        def chosen(module: Any, *args: Any, **named: Any) -> Any:
            if (thread := threading.get_ident()) in groups:
                return forward(module, groups[thread], *args, **named)
            if own is not None:
                return own(module, *args, **named)
            above: Any = super(wrapper, module)
            return above.forward(*args, **named)

        self._chosen: Any = torch.compiler.disable(chosen, recursive=False)
        self._wrapper, self._own, self._groups = wrapper, own, groups

    @contextmanager
    def within(self, group: ProcessGroup | None) -> Iterator[None]:
        """Be within a step of the group in this thread."""
        with _LOCK:
            self._groups[threading.get_ident()] = group
            self._wrapper.forward = self._chosen
        try:
            yield
        finally:
            with _LOCK:
                del self._groups[threading.get_ident()]
                if not self._groups and self._own is None:
                    del self._wrapper.forward
                elif not self._groups:
                    self._wrapper.forward = self._own


def _other_forward(wrapper: Any, forward: Callable[..., Any]) -> _OtherForward:
    with _LOCK:
        return _made(wrapper, forward)


_made = functools.cache(_OtherForward)


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
    if hasattr(module, "reshard"):
        module.reshard()  # its hooks have put the parameters together
    raise TrustRegionError(
        f"The policy holds a {type(module).__name__}, sharded by FSDP: its parameters are put "
        "together outside of autograd, which cannot differentiate them twice. Keep a whole copy on "
        "every rank, plain or in DistributedDataParallel, and pass process_group; or shard it by "
        "tensor parallelism (parallelize_module)."
    )
