"""Steps of policies in distributed wrappers."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from problems import Problem, gaussian
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from torch.nn.parallel import DistributedDataParallel
from torch.torch_version import TorchVersion

from trpo_optim import StepReport, TrustRegionError, TrustRegionOptimizer, frozen

pytestmark = pytest.mark.ranks


def stepped(
    task: Problem, *, third: bool, rows: slice = slice(None), **settings: Any
) -> tuple[Tensor, StepReport]:
    """Take two steps on some rows, each with the old policy of its own.

    Returns:
        The parameters, whole, and the second report.
    """
    optimizer = task.optimizer(**settings)
    for _ in range(2):
        report = optimizer.step(closure_on(task, rows, third=third))
    pieces = (getattr(each, "full_tensor", lambda each=each: each)() for each in task.parameters())
    return torch.cat([each.detach().reshape(-1) for each in pieces]), report


def closure_on(task: Problem, rows: slice, *, third: bool = True) -> Any:
    """Return the closure of some rows, whose old policy is the policy as it is now."""
    part = Problem.__new__(Problem)
    part.policy, part.observations = task.policy, task.observations[rows]
    part.actions, part.advantages = task.actions[rows], task.advantages[rows]
    with torch.no_grad():
        part.old = frozen(task.policy(part.observations))
        part.old_log_prob = part.old.log_prob(part.actions)

    def closure() -> Any:
        new = part.policy(part.observations)
        return (*part.values(new), new) if third else part.values(new)

    return closure


def refused(rank: int, wrap: str) -> str:
    """Return what a step says of a wrapper."""
    task = gaussian()
    if wrap == "DDP without group":
        task.policy = DistributedDataParallel(task.policy)
    elif wrap == "zero redundancy":
        from torch.distributed.optim import ZeroRedundancyOptimizer  # warns of torch's own

        try:
            ZeroRedundancyOptimizer(task.policy.parameters(), TrustRegionOptimizer, max_kl=0.01)
        except TrustRegionError as error:
            return str(error)
    else:
        mesh, network = init_device_mesh("cpu", (2,)), task.policy.network
        assert isinstance(network, nn.Module)
        parallelize_module(network, mesh, {"0": ColwiseParallel(), "2": RowwiseParallel()})
        setattr(torch, "__version__", TorchVersion("2.12.1+cpu"))  # noqa: B010 (typed as final)
    optimizer = task.optimizer()
    try:
        optimizer.step(task.closure)
    except TrustRegionError as error:
        return str(error)
    return "nothing"
