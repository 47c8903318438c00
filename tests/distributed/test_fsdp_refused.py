"""Parameters sharded by FSDP2: what is refused names the way out."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
from fsdp_policies import core_of, half, sharded, task_of
from ranks import Raised, on_ranks, values_of
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, MixedPrecisionPolicy, fully_shard
from torch.torch_version import TorchVersion

from trpo_optim import TrustRegionError, TrustRegionOptimizer

pytestmark = [pytest.mark.ranks, pytest.mark.no_cover]


Case = tuple[Any, str]
REFUSED: dict[str, Case] = {}


def refused_case(text: str) -> Callable[[Any], Any]:
    """Have a function be a case: it returns a task, the settings and what step() gets."""

    def keep(function: Any) -> Any:
        REFUSED[function.__name__] = (function, text)
        return function

    return keep


def world() -> dict[str, Any]:
    """Return the settings of an optimizer of all ranks."""
    return {"process_group": dist.group.WORLD}


@refused_case("engine is 'Gauss-Newton', which does not serve.*FSDP has sharded.*'finite differen")
def gauss_newton(rank: int) -> Any:
    task = sharded(task_of())
    return task, {**world(), "engine": "Gauss-Newton"}, half(task, rank), {}


@refused_case("engine is 'double backward', which does not serve.*FSDP has sharded.*'finite diff")
def double_backward(rank: int) -> Any:
    task = sharded(task_of())
    return task, {**world(), "engine": "double backward"}, half(task, rank), {}


@refused_case("engine is 'torch.func', which does not serve this closure: FSDP has sharded")
def torch_func(rank: int) -> Any:
    task = sharded(task_of())
    return task, {**world(), "engine": "torch.func"}, half(task, rank), {}


@refused_case(
    "got 3 whole parameters that FSDP keeps for a while.*before the policy runs, or.*resh"
)
def gathered(rank: int) -> Any:
    task = sharded(task_of())
    return task, world(), half(task, rank), {}


@refused_case("FSDP has sharded the parameters, and the optimizer has no process_group.*WORLD")
def no_group(rank: int) -> Any:
    task = sharded(task_of())
    return task, {}, half(task, rank), {}


@refused_case(r"over the ranks \[0, 1\], and the process_group holds the ranks \[[01]\]")
def another_group(rank: int) -> Any:
    groups = [dist.new_group([each]) for each in range(2)]
    task = sharded(task_of())
    return task, {"process_group": groups[rank]}, half(task, rank), {}


@refused_case(r"over a mesh of shape \(1, 2\); a step serves a mesh of one dimension")
def replicas(rank: int) -> Any:
    mesh = init_device_mesh("cpu", (1, 2), mesh_dim_names=("copies", "parts"))
    task = sharded(task_of(), mesh=mesh)
    return task, world(), half(task, rank), {}


@refused_case(
    r"sharded 6 of the parameters, and not 1 others, such as one of shape \(1,\).*ignored"
)
def ignored(rank: int) -> Any:
    task = task_of()
    core = core_of(task)
    for block in core.blocks:
        fully_shard(block)
    fully_shard(core, ignored_params={core.log_std})
    return task, world(), half(task, rank), {}


@refused_case("param_dtype=torch.bfloat16; curvature.*Leave param_dtype out, or use mode='vanilla'")
def half_precision(rank: int) -> Any:
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16)
    task = sharded(task_of(dtype=torch.float32), mp_policy=policy)
    return task, world(), half(task, rank), {}


@refused_case("reduce_dtype=torch.bfloat16; curvature.*Leave reduce_dtype out")
def half_precision_sums(rank: int) -> Any:
    policy = MixedPrecisionPolicy(reduce_dtype=torch.bfloat16)
    task = sharded(task_of(dtype=torch.float32), mp_policy=policy)
    return task, world(), half(task, rank), {}


@refused_case("has parameters in half precision.*autocast.*float32 or float64.*mode='vanilla'")
def half_parameters(rank: int) -> Any:
    task = sharded(task_of(dtype=torch.bfloat16))
    return task, world(), half(task, rank), {}


@refused_case("computes in half precision, as under autocast.*without autocast.*mode='vanilla'")
def autocast_on_one_rank(rank: int) -> Any:
    task = sharded(task_of(dtype=torch.float32))
    closure = half(task, rank)

    def in_half_precision() -> Any:
        with torch.autocast("cpu", torch.bfloat16, enabled=rank == 1):
            return closure()

    return task, {**world(), "engine": "finite differences"}, in_half_precision, {}


@refused_case(r"set_requires_gradient_sync\(False\) has switched off.*list of closures")
def no_sums(rank: int) -> Any:
    task = sharded(task_of())
    core = core_of(task)
    core.set_requires_gradient_sync(False)
    return task, world(), half(task, rank), {}


@refused_case(
    r"set_all_reduce_hook\(\) has given FSDP a hook that changes gradients.*Remove the hook"
)
def hooks_on_sums(rank: int) -> Any:
    task = sharded(task_of())
    core_of(task).set_all_reduce_hook(lambda gradients: None)
    return task, world(), half(task, rank), {}


@refused_case("The closures or weights of rank 1 are left out.*every rank a closure with samples")
def no_samples(rank: int) -> Any:
    task = sharded(task_of())
    closure = half(task, rank)
    return task, world(), [] if rank else closure, {"weights": [] if rank else 64}


@refused_case("different numbers of closures .rank 0: 1; rank 1: 2.*equally many micro-batches")
def unequal_counts(rank: int) -> Any:
    task = sharded(task_of())
    return task, world(), [half(task, rank)] * (rank + 1), {}


@refused_case("closure of rank 1 runs the modules of a policy in FSDP more often than")
def unequal_runs(rank: int) -> Any:
    task = sharded(task_of())
    closure = half(task, rank)
    return task, world(), lambda: max((closure() for _ in range(rank + 1)), key=id), {}


@refused_case("returns a Independent, in which FSDP finds no tensors.*make the distribution")
def distributions(rank: int) -> Any:
    task = task_of()
    fully_shard(task.policy)
    return task, world(), half(task, rank), {}


@refused_case(r"uses a parameter of shape \(1,\) that FSDP has sharded, outside of its module")
def outside(rank: int) -> Any:
    task = sharded(task_of())
    closure, core = half(task, rank), core_of(task)

    def with_a_parameter() -> Any:
        loss, kl, _ = closure()
        core.reshard()
        return loss + core.log_std.full_tensor().sum(), kl

    return task, world(), with_a_parameter, {}


@refused_case("a tensor from outside that shares memory with a parameter.*clone")
def old_views(rank: int) -> Any:
    task = sharded(task_of())
    core = core_of(task)
    with torch.no_grad():
        core(task.observations)  # which leaves the core whole
    old = core.log_std.expand(3)

    def closure() -> Any:
        mean, std = core(task.observations)
        return mean.mean(), (old - std.log().mean()).square().mean() + mean.sum() * 0

    return task, world(), closure, {}


@refused_case("a FSDPLinear, sharded by FSDP, and FSDP has not sharded the optimizer's parameters")
def frozen_encoder(rank: int) -> Any:
    task = task_of()
    encoder = nn.Linear(4, 4).double().requires_grad_(False)
    fully_shard(encoder)

    def closure() -> Any:
        mean, _ = core_of(task)(encoder(task.observations))
        return mean.mean(), mean.square().mean() * 0

    return task, world(), closure, {}


@refused_case("shapes or types on rank 1 differ.*FullyShardedDataParallel gives.*use fully_shard")
def first_version(rank: int) -> Any:
    task = task_of()
    task.policy = FullyShardedDataParallel(
        task.policy, device_id=torch.device("cpu"), use_orig_params=True
    )
    return task, world(), lambda: (task.policy(task.observations),), {}


@refused_case("FullyShardedDataParallel, the first version of FSDP.*Use.*fully_shard")
def first_version_frozen(rank: int) -> Any:
    task = task_of()
    encoder = FullyShardedDataParallel(
        nn.Linear(4, 4).double().requires_grad_(False), device_id=torch.device("cpu")
    )
    return task, world(), lambda: (encoder(task.observations),), {}


@refused_case(r"DTensors, which torch 2.12.1\+cpu cannot.*Use torch 2.13 or later")
def old_torch(rank: int) -> Any:
    task = sharded(task_of())
    closure = half(task, rank)
    setattr(torch, "__version__", TorchVersion("2.12.1+cpu"))  # noqa: B010 (typed as final)
    return task, world(), closure, {}


def refusals(rank: int, names: list[str]) -> list[str]:
    """Return what steps say, one after the other."""
    said = []
    for name in names:
        task, settings, closure, further = REFUSED[name][0](rank)
        modules: list[Any] = [each for each in task.policy.modules() if hasattr(each, "reshard")]
        for each in [] if name == "gathered" else modules:
            each.reshard()
        try:
            TrustRegionOptimizer(task.parameters(), **settings).step(closure, **further)
            said.append("nothing")
        except TrustRegionError as error:
            said.append(str(error))
    return said


def old_torch_itself(rank: int) -> str:
    """Return what a step says of sharded parameters."""
    task = task_of()
    fully_shard(core_of(task))
    try:
        task.optimizer(**world()).step(task.closure)
    except TrustRegionError as error:
        return str(error)
    return "nothing"


@pytest.mark.skipif(torch.__version__ >= "2.13", reason="serves them")
def test_an_older_torch_is_named() -> None:
    for text in values_of(on_ranks(2, old_torch_itself)):
        assert re.search(r"DTensors, which torch .* cannot.*Use torch 2.13 or later", text)


@pytest.mark.skipif(torch.__version__ < "2.13", reason="as tested above")
def test_what_cannot_be_names_the_way_out() -> None:
    results = on_ranks(2, refusals, list(REFUSED))
    for rank, found in enumerate(results):
        assert not isinstance(found, Raised), found.trace
        for text, (name, (_, expected)) in zip(found, REFUSED.items(), strict=True):
            assert re.search(expected, text), (rank, name, text)
