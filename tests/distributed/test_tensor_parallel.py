"""Parameters in parts on several ranks, and checkpoints for other numbers of ranks."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from problems import GaussianPolicy, Problem, gaussian
from ranks import on_ranks, values_of
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import save
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Replicate, Shard, distribute_tensor
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from torch.distributions import Distribution, Independent, Normal
from wrapped_steps import closure_on, stepped

from trpo_optim import StepReport

pytestmark = [pytest.mark.ranks, pytest.mark.no_cover]


def parallel(rank: int, copies: int, third: bool) -> tuple[Tensor, StepReport]:
    """Step with layers in parts on some ranks and, where these are not all, copies of the whole."""
    task = gaussian()
    mesh = init_device_mesh(
        "cpu", (copies, dist.get_world_size() // copies), mesh_dim_names=("data", "parts")
    )
    plan = {"0": ColwiseParallel(), "2": RowwiseParallel()}
    network = task.policy.network
    assert isinstance(network, nn.Module)
    parallelize_module(network, mesh["parts"], plan)
    half = len(task.actions) // copies
    rows = slice(half * mesh["data"].get_local_rank(), half * (mesh["data"].get_local_rank() + 1))
    group = mesh["data"].get_group() if copies > 1 else None
    return stepped(task, third=third, rows=rows, process_group=group)


@pytest.mark.skipif(torch.__version__ < "2.13", reason="refused, as tested below")
@pytest.mark.parametrize(
    ("ranks", "copies", "third"),
    [
        pytest.param(2, 1, False, id="parts-pair"),
        pytest.param(4, 2, True, id="parts and copies-third value"),
        pytest.param(2, 1, True, id="parts-third value", marks=pytest.mark.thorough),
        pytest.param(4, 2, False, id="parts and copies-pair", marks=pytest.mark.thorough),
    ],
)
def test_tensor_parallel_parameters_take_the_step_of_plain_ones(
    ranks: int, copies: int, third: bool
) -> None:
    expected, alone = stepped(gaussian(), third=third)
    for vector, report in values_of(on_ranks(ranks, parallel, copies, third)):
        torch.testing.assert_close(vector, expected, rtol=1e-10, atol=1e-12)
        assert report.accepted
        assert report.engine == (alone.engine if third else "double backward")


class PartedScale(GaussianPolicy):
    """A policy that puts the parts of its standard deviation together itself."""

    def __init__(self, take: str) -> None:
        torch.manual_seed(0)
        super().__init__(4, 6, 2)
        self.take = take

    def forward(self, observation: Tensor) -> Distribution:
        log_std: Any = self.log_std
        for name in self.take.split():
            log_std = getattr(log_std, name)()
        return Independent(Normal(self.network(observation), log_std.exp()), 1)


def parted_scale_steps(policy: nn.Module) -> Tensor:
    """Return the parameters after two steps on a batch that is the same everywhere."""
    torch.manual_seed(1)
    return stepped(Problem(policy, torch.randn(64, 4, dtype=torch.float64)), third=False)[0]


def with_parted_scale(rank: int, take: str, place: Any) -> Tensor:
    """Step with every parameter in parts."""
    policy = PartedScale(take).double()
    mesh, network = init_device_mesh("cpu", (dist.get_world_size(),)), policy.network
    parallelize_module(network, mesh, {"0": ColwiseParallel(), "2": RowwiseParallel()})
    policy.log_std = nn.Parameter(distribute_tensor(policy.log_std.detach(), mesh, [place]))
    return parted_scale_steps(policy)


@pytest.mark.skipif(torch.__version__ < "2.13", reason="refused, as tested below")
@pytest.mark.parametrize(
    ("take", "place"), [("full_tensor", Shard(0)), ("to_local", Replicate())], ids=str
)
def test_parts_of_a_parameter_are_put_together_by_the_closure_after_a_clone(
    take: str, place: Any
) -> None:
    expected = parted_scale_steps(PartedScale("clone").double())
    for vector in values_of(on_ranks(2, with_parted_scale, f"clone {take}", place)):
        torch.testing.assert_close(vector, expected, rtol=1e-10, atol=1e-12)
    for raised in on_ranks(2, with_parted_scale, take, place):
        assert raised.kind == "TrustRegionError"
        assert "parameter.clone().full_tensor()" in raised.text


def saved_and_stepped(rank: int, folder: Path, first: bool) -> tuple[Tensor, Any, StepReport]:
    """Save after two steps, or load what was saved; then take one more step on the whole batch."""
    task = gaussian(0 if first else 3)
    optimizer = task.optimizer(
        process_group=dist.group.WORLD,
        max_kl=0.02 if first else 0.01,
        preconditioner="diagonal",
    )
    torch.manual_seed(1)
    task.observations = torch.randn(64, 4, dtype=torch.float64)
    ranks = dist.get_world_size()
    rows = slice(64 * rank // ranks, 64 * (rank + 1) // ranks)
    if first:
        for _ in range(2):
            optimizer.step(closure_on(task, rows))
        model, state = get_state_dict(task.policy, optimizer)
        save({"model": model, "optimizer": state}, checkpoint_id=folder)
    else:
        model, state = get_state_dict(task.policy, optimizer)
        load({"model": model, "optimizer": state}, checkpoint_id=folder)
        set_state_dict(task.policy, optimizer, model_state_dict=model, optim_state_dict=state)
    task = Problem(task.policy, task.observations)
    report = optimizer.step(closure_on(task, rows))
    return task.vector(), optimizer.param_groups[0]["max_kl"], report


def test_a_distributed_checkpoint_goes_on_alike_on_other_numbers_of_ranks(tmp_path: Path) -> None:
    expected, *_ = values_of(on_ranks(4, saved_and_stepped, tmp_path, True))
    for ranks in (1, 2):
        for vector, radius, report in values_of(
            on_ranks(ranks, saved_and_stepped, tmp_path, False)
        ):
            torch.testing.assert_close(vector, expected[0], rtol=1e-12, atol=1e-14)
            assert radius == 0.02
            assert report.outcome is expected[2].outcome
