"""PyTorch's distributed wrappers of a policy: what they are told during a step, which cannot be."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch.distributed as dist
from torch import nn
from torch.nn.modules.module import register_module_forward_pre_hook
from torch.nn.parallel import DistributedDataParallel

from trpo_optim.report import TrustRegionError

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

__all__ = ["unwrapped"]


@contextmanager
def unwrapped(group: ProcessGroup | None) -> Iterator[None]:
    """Have ``DistributedDataParallel`` run its module and nothing else, until the step ends.

    It would prepare itself for a ``backward()`` that never comes, and send its buffers in every
    evaluation, of which ranks may make more or fewer. The optimizer reduces by itself.

    Args:
        group: The optimizer's.

    Yields:
        Nothing.

    Raises:
        TrustRegionError: From the policy's forward: if DDP wraps it and the optimizer has no group,
            or if FSDP has sharded it.
    """
    if not (dist.is_available() and dist.is_initialized()):
        yield
        return
    met: dict[DistributedDataParallel, tuple[bool, bool]] = {}

    def meet(module: nn.Module, args: Any) -> None:  # noqa: ARG001 (torch's signature)
        if isinstance(module, DistributedDataParallel) and module not in met:
            if group is None and dist.get_world_size(module.process_group) > 1:
                raise TrustRegionError(
                    "The policy is wrapped in DistributedDataParallel, and the optimizer has no "
                    "process_group: every rank would take a step of its own. Pass "
                    "process_group=ddp.process_group (or torch.distributed.group.WORLD)."
                )
            met[module] = module.require_backward_grad_sync, module.require_forward_param_sync
            module.require_backward_grad_sync = module.require_forward_param_sync = False
        elif _is_sharded(module):
            raise TrustRegionError(
                f"The policy holds a {type(module).__name__}, sharded by FSDP: its parameters are "
                "put together outside of autograd, which cannot differentiate them twice. Keep a "
                "whole copy on every rank, plain or in DistributedDataParallel, and pass "
                "process_group; or shard it by tensor parallelism (parallelize_module)."
            )

    hook = register_module_forward_pre_hook(meet)
    try:
        yield
    finally:
        hook.remove()
        for module, (backward, forward) in met.items():
            module.require_backward_grad_sync = backward
            module.require_forward_param_sync = forward


def _is_sharded(module: nn.Module) -> bool:
    """Whether a module is one of FSDP's, in either version; without importing them."""
    fsdp = sys.modules.get("torch.distributed.fsdp")
    if fsdp is None:
        return False
    return isinstance(module, (fsdp.FSDPModule, fsdp.FullyShardedDataParallel))
