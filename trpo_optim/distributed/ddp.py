"""PyTorch's distributed wrappers of a policy: suspended during a step, or refused."""

from __future__ import annotations

import functools
import inspect
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, is_dataclass
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from trpo_optim.closure.parameters import ParameterVector
from trpo_optim.distributed.fsdp import RanksInStep
from trpo_optim.errors import TrustRegionError

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

__all__ = ["require_all_parameters", "unwrapped"]

_LOCK = threading.RLock()


@dataclass(frozen=True)
class _Step:
    """The process group of a step, and what the step moves."""

    group: ProcessGroup | None
    vector: ParameterVector
    in_step: RanksInStep | None

    def moves(self, module: nn.Module) -> bool:
        """Return whether the step moves a parameter of a module."""
        own = {id(each) for each in self.vector.parameters}
        return any(id(each) in own for each in module.parameters())


def require_all_parameters() -> None:
    """Check that the optimizer that is being made is not one of a ``ZeroRedundancyOptimizer``.

    Raises:
        TrustRegionError: If it is: it would have a part of the parameters.
    """
    module = sys.modules.get("torch.distributed.optim")
    wrapper = getattr(module, "ZeroRedundancyOptimizer", None)
    frame = inspect.currentframe()
    while wrapper is not None and frame is not None:
        if isinstance(frame.f_locals.get("self"), wrapper):
            raise TrustRegionError(
                "ZeroRedundancyOptimizer gives every rank's TrustRegionOptimizer a part of the "
                "parameters; one step needs all of them, or the KLs of the parts add up beyond "
                "max_kl. Make one from policy.parameters() on every rank, with "
                "process_group=torch.distributed.group.WORLD."
            )
        frame = frame.f_back


@contextmanager
def unwrapped(
    group: ProcessGroup | None, vector: ParameterVector, in_step: RanksInStep | None
) -> Iterator[None]:
    """Have ``DistributedDataParallel`` run its module and nothing else, until the step ends.

    Its own forward prepares for a ``backward()`` that never comes, and sends buffers and sometimes
    the order of its buckets, while ranks may make more or fewer evaluations. The optimizer reduces
    by itself.

    Args:
        group: The optimizer's.
        vector: What the step moves. DDP around other modules, as a frozen encoder, needs no group.
        in_step: Keeps the ranks in step if FSDP has sharded the parameters; else None.

    Yields:
        Nothing.

    Raises:
        TrustRegionError: From the policy's forward: if DDP wraps it and the optimizer has no group,
            if FSDP's first version has sharded it, or if FSDP has sharded it and not the
            optimizer's parameters.
    """
    step = _Step(group, vector, in_step)
    with ExitStack() as stack:
        if dist.is_available() and dist.is_initialized():
            stack.enter_context(
                _other(DistributedDataParallel, "forward", _run_replica).within(step)
            )
            ways = {"FSDPModule": _run_in_step, "FullyShardedDataParallel": _refuse}
            for name, way in ways.items():
                if wrapper := getattr(sys.modules.get("torch.distributed.fsdp"), name, None):
                    call = _other(wrapper, "__call__", way)  # which comes before its hooks
                    stack.enter_context(call.within(step))
        yield


class _Other:
    """Another method of all modules of a class, for the threads that are within a step.

    It is set on the class, since a step does not know which modules its closure calls, and hooks
    that come and go would have compiled modules compiled again at every step.
    """

    def __init__(self, wrapper: Any, name: str, method: Callable[..., Any]) -> None:
        own = vars(wrapper).get(name)
        steps: dict[int, _Step] = {}

        def chosen(module: Any, *args: Any, **named: Any) -> Any:
            if (thread := threading.get_ident()) in steps:
                return method(module, steps[thread], *args, **named)
            if own is not None:
                return own(module, *args, **named)
            return getattr(super(wrapper, module), name)(*args, **named)

        self._chosen: Any = torch.compiler.disable(chosen, recursive=False)
        self._wrapper, self._name, self._own, self._steps = wrapper, name, own, steps

    @contextmanager
    def within(self, step: _Step) -> Iterator[None]:
        """Be within a step in this thread."""
        with _LOCK:
            self._steps[threading.get_ident()] = step
            setattr(self._wrapper, self._name, self._chosen)
        try:
            yield
        finally:
            with _LOCK:
                del self._steps[threading.get_ident()]
                if not self._steps and self._own is None:
                    delattr(self._wrapper, self._name)
                elif not self._steps:
                    setattr(self._wrapper, self._name, self._own)


def _other(wrapper: Any, name: str, method: Callable[..., Any]) -> _Other:
    with _LOCK:
        return _made(wrapper, name, method)


_made = functools.cache(_Other)


def _run_replica(module: DistributedDataParallel, step: _Step, *args: Any, **named: Any) -> Any:
    alone = step.group is None and dist.get_world_size(module.process_group) > 1
    if alone and step.moves(module):
        raise TrustRegionError(
            "The policy is wrapped in DistributedDataParallel, and the optimizer has no "
            "process_group, so every rank would take its own step. Pass "
            "process_group=ddp.process_group (or torch.distributed.group.WORLD)."
        )
    return module.module(*args, **named)


def _run_in_step(module: Any, step: _Step, *args: Any, **named: Any) -> Any:
    if step.in_step is None:
        raise TrustRegionError(
            f"The policy holds a {type(module).__name__}, sharded by FSDP, and FSDP has not "
            "sharded the optimizer's parameters. Call fully_shard on the module that holds all of "
            "them, and make the optimizer afterwards, from its parameters."
        )
    step.in_step.about_to_run()
    kind = sys.modules["torch.distributed.fsdp"].FSDPModule
    returned = super(kind, module).__call__(*args, **named)
    if not _holds_tensors(returned):
        raise TrustRegionError(
            f"The {type(module).__name__} returns a {type(returned).__name__}, in which FSDP finds "
            "no tensors, so it would not add up the gradients. Return tensors from its forward(), "
            "and make the distribution from them outside of it."
        )
    return returned


def _holds_tensors(value: Any) -> bool:
    """Return whether FSDP finds a tensor in what a module returns."""
    if isinstance(value, dict):
        return any(map(_holds_tensors, value.values()))
    if isinstance(value, list | tuple):
        return any(map(_holds_tensors, value))
    if is_dataclass(value):
        return any(map(_holds_tensors, vars(value).values()))
    return isinstance(value, Tensor)


def _refuse(module: Any, step: _Step, *args: Any, **named: Any) -> Any:  # noqa: ARG001 (called as others are)
    raise TrustRegionError(
        f"The policy holds a {type(module).__name__}, the first version of FSDP, which flattens "
        "parameters. Use its second version: torch.distributed.fsdp.fully_shard(policy)."
    )
