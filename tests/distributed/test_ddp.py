"""Policies in PyTorch's distributed wrappers, and checkpoints for other numbers of ranks."""

from __future__ import annotations

import re
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from problems import MODES, GaussianPolicy, Problem, gaussian
from ranks import on_ranks, values_of
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounter
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import save
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import Replicate, Shard, distribute_tensor
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from torch.distributions import Categorical, Distribution, Independent, Normal
from torch.nn.parallel import DistributedDataParallel
from torch.torch_version import TorchVersion

from trpo_optim import StepReport, TrustRegionError, TrustRegionOptimizer, frozen, mean_kl

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
@pytest.mark.parametrize("third", [False, True], ids=["pair", "third value"])
@pytest.mark.parametrize(("ranks", "copies"), [(2, 1), (4, 2)], ids=["parts", "parts and copies"])
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


class Normalised(nn.Module):
    """A policy behind a batch normalisation, whose running statistics DDP sends around."""

    def __init__(self, policy: nn.Module) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(4).double().eval()
        self.policy = policy

    def forward(self, observations: Tensor) -> Any:
        return self.policy(self.norm(observations))


def replicated(
    rank: int, mode: str, options: dict[str, Any]
) -> tuple[Tensor, StepReport, Tensor | None, list[Any]]:
    """Step with a policy in DDP, uneven micro-batches, and then make a backward pass of one's own.

    Returns:
        Parameters, report, the gradient of that pass, and what DDP is set to before and after.
    """
    task = gaussian()
    task.policy = DistributedDataParallel(Normalised(task.policy), **options)
    names = ("require_backward_grad_sync", "require_forward_param_sync")
    optimizer = task.optimizer(mode=mode, process_group=task.policy.process_group, lr=0.5)
    rows = [slice(0, 40)] if rank == 0 else [slice(40, 54), slice(54, 64)]
    for _ in range(2):
        closures = [closure_on(task, each, third=False) for each in rows]
        before = [getattr(task.policy, name) for name in names]
        report = optimizer.step(closures, weights=[40] if rank == 0 else [14, 10])
    after = [getattr(task.policy, name) for name in names]
    if options:  # DDP does not find the parameters of a distribution
        return task.vector(), report, None, [before, after]
    task.policy(task.observations[rank::2]).log_prob(task.actions[rank::2]).sum().backward()
    gradient = task.policy.module.policy.network[0].weight.grad
    return task.vector(), report, gradient.clone(), [before, after]


@pytest.mark.parametrize("options", [{}, {"find_unused_parameters": True}], ids=["", "unused"])
@pytest.mark.parametrize("mode", MODES)
def test_policies_in_ddp_take_the_step_of_plain_ones(mode: str, options: dict[str, Any]) -> None:
    task = gaussian()
    task.policy = Normalised(task.policy)
    expected, alone = stepped(task, third=False, mode=mode, lr=0.5)
    results = values_of(on_ranks(2, replicated, mode, options))
    for vector, report, gradient, (before, after) in results:
        torch.testing.assert_close(vector, expected, rtol=1e-10, atol=1e-12)
        assert report.outcome is alone.outcome
        assert gradient is None or torch.equal(gradient, results[0][2])  # DDP still averages
        assert before == after


class Logits(nn.Module):
    """A policy that returns tensors, as DDP likes it."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.network = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3)).double()

    def forward(self, observations: Tensor) -> Tensor:
        logits: Tensor = self.network(observations)
        return logits


def logits_closure(policy: Any) -> tuple[Any, Tensor]:
    """Return a closure of logits on a fixed batch, and its observations."""
    torch.manual_seed(1)
    observations = torch.randn(32, 4, dtype=torch.float64)
    actions, advantages = torch.randint(0, 3, (32,)), torch.randn(32, dtype=torch.float64)
    with torch.no_grad():
        old = Categorical(logits=policy(observations).clone())

    def closure() -> Any:
        new = Categorical(logits=policy(observations))
        ratio = (new.log_prob(actions) - old.log_prob(actions)).exp()
        return -(ratio * advantages).mean(), mean_kl(old, new)

    return closure, observations


def with_passes_of_ones_own(
    rank: int, options: dict[str, Any], empty: bool
) -> tuple[Tensor, Tensor]:
    """Step in DDP between backward passes of one's own, where rank 1 may be without samples.

    Returns:
        The parameters, and the gradient of the last pass.
    """
    policy = DistributedDataParallel(Logits(), **options)
    closure, observations = logits_closure(policy.module)
    optimizer = TrustRegionOptimizer(policy.parameters(), process_group=dist.group.WORLD)
    for _ in range(2):
        policy(observations).square().sum().backward()
        optimizer.zero_grad()
        closure, _ = logits_closure(policy)
        assert optimizer.step([] if empty and rank == 1 else closure).accepted
    policy(observations * (rank + 1)).square().sum().backward()
    gradient = policy.module.network[0].weight.grad
    assert gradient is not None
    return nn.utils.parameters_to_vector(policy.parameters()).detach(), gradient


@pytest.mark.parametrize("empty", [False, True], ids=["all", "one without samples"])
@pytest.mark.parametrize("options", [{}, {"static_graph": True}], ids=["", "static graph"])
def test_ddp_does_nothing_of_its_own_during_a_step(options: dict[str, Any], empty: bool) -> None:
    policy = Logits()
    optimizer = TrustRegionOptimizer(policy.parameters())
    for _ in range(2):
        assert optimizer.step(logits_closure(policy)[0]).accepted
    expected = nn.utils.parameters_to_vector(policy.parameters()).detach()
    (first, gradient), (second, other) = values_of(
        on_ranks(2, with_passes_of_ones_own, options, empty)
    )
    torch.testing.assert_close(first, expected, rtol=1e-10, atol=1e-12)
    assert torch.equal(first, second)
    assert torch.equal(gradient, other)  # DDP still averages


def in_another_thread(rank: int) -> list[bool]:
    """Return by which forward DDP runs in this thread and in another, and afterwards."""
    usual: Any = DistributedDataParallel.forward
    took: list[bool] = []

    def noting(self: Any, *args: Any) -> Any:
        took.append(True)
        return usual(self, *args)

    setattr(DistributedDataParallel, "forward", noting)  # noqa: B010 (typed as the method)
    policy = DistributedDataParallel(Logits())
    inner, _ = logits_closure(policy)
    took.clear()

    def calls() -> bool:
        took.clear()
        policy(torch.zeros(1, 4, dtype=torch.float64))
        return bool(took)

    found: list[bool] = []

    def closure() -> Any:
        if not found:
            found.append(calls())
            thread = threading.Thread(target=lambda: found.append(calls()))
            thread.start()
            thread.join()
        return inner()

    optimizer = TrustRegionOptimizer(policy.parameters(), process_group=dist.group.WORLD)
    assert optimizer.step(closure).accepted
    return [*found, calls()]


def test_ddp_in_other_threads_runs_as_ever() -> None:
    assert values_of(on_ranks(1, in_another_thread)) == [[False, True, True]]


def compiled(rank: int, wrap: bool) -> int:
    """Return how often a compiled policy is compiled in four steps."""
    counter = CompileCounter()
    bare = Logits()
    policy = torch.compile(DistributedDataParallel(bare) if wrap else bare, backend=counter)
    optimizer = TrustRegionOptimizer(bare.parameters(), process_group=dist.group.WORLD)
    for _ in range(4):
        assert optimizer.step(logits_closure(policy)[0]).accepted
    return int(counter.frame_count)


@pytest.mark.parametrize("wrap", [False, True], ids=["plain", "DDP"])
def test_a_compiled_policy_is_compiled_no_more_often_than_without_steps(wrap: bool) -> None:
    for count in values_of(on_ranks(2, compiled, wrap)):
        assert 1 <= count <= 2  # with and without gradients


def refused(rank: int, wrap: str) -> str:
    """Return what a step says of a wrapper."""
    task = gaussian()
    settings: dict[str, Any] = {}
    if wrap == "DDP without group":
        task.policy = DistributedDataParallel(task.policy)
    elif wrap == "tensor parallelism of old":
        mesh, network = init_device_mesh("cpu", (2,)), task.policy.network
        assert isinstance(network, nn.Module)
        parallelize_module(network, mesh, {"0": ColwiseParallel(), "2": RowwiseParallel()})
        setattr(torch, "__version__", TorchVersion("2.12.1+cpu"))  # noqa: B010 (typed as final)
    else:
        fully_shard(task.policy)
        settings = {"process_group": dist.group.WORLD}
    optimizer = task.optimizer(**settings)
    try:
        optimizer.step(task.closure)
    except TrustRegionError as error:
        return str(error)
    return "nothing"


@pytest.mark.parametrize(
    ("wrap", "text"),
    [
        (
            "DDP without group",
            "the optimizer has no process_group.*process_group=ddp.process_group",
        ),
        ("tensor parallelism of old", r"torch 2.12.1\+cpu cannot.*Use torch 2.13 or later"),
        (
            "FSDP",
            "sharded by FSDP.*Keep a whole copy on every rank.*parallelize_module"
            if torch.__version__ >= "2.13"
            else "Use torch 2.13 or later; or keep a whole copy on every rank",
        ),
    ],
)
def test_what_cannot_be_names_the_way_out(wrap: str, text: str) -> None:
    for said in values_of(on_ranks(2, refused, wrap)):
        assert re.search(text, said)


def saved_and_stepped(rank: int, folder: Path, first: bool) -> tuple[Tensor, Any, StepReport]:
    """Save after two steps, or load what was saved; then take one more step on the whole batch."""
    task = gaussian(0 if first else 3)
    optimizer = task.optimizer(process_group=dist.group.WORLD, max_kl=0.02 if first else 0.01)
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
