"""Policies in DDP, and wrappers that are refused."""

from __future__ import annotations

import re
import threading
from typing import Any

import pytest
import torch
import torch.distributed as dist
from problems import MODES, gaussian
from ranks import on_ranks, values_of
from torch import Tensor, nn
from torch.distributions import Categorical
from torch.nn.parallel import DistributedDataParallel
from wrapped_steps import closure_on, refused, stepped

from trpo_optim import StepReport, TrustRegionOptimizer, mean_kl

pytestmark = [pytest.mark.ranks, pytest.mark.no_cover]


EXACT = "double backward"
"""The engine: micro-batches would take finite differences by themselves."""


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
    settings = {"mode": mode, "lr": 0.5, "engine": EXACT}
    optimizer = task.optimizer(process_group=task.policy.process_group, **settings)
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


@pytest.mark.parametrize(
    ("mode", "options"),
    [
        *((mode, {}) for mode in MODES),
        ("trpo", {"find_unused_parameters": True}),
        *(
            pytest.param(mode, {"find_unused_parameters": True}, marks=pytest.mark.thorough)
            for mode in ("natural", "vanilla")
        ),
    ],
)
def test_policies_in_ddp_take_the_step_of_plain_ones(mode: str, options: dict[str, Any]) -> None:
    task = gaussian()
    task.policy = Normalised(task.policy)
    expected, alone = stepped(task, third=False, mode=mode, lr=0.5, engine=EXACT)
    results = values_of(on_ranks(2, replicated, mode, options))
    for vector, report, gradient, (before, after) in results:
        torch.testing.assert_close(vector, expected, rtol=1e-10, atol=1e-12)
        assert report.outcome is alone.outcome
        assert gradient is None or torch.equal(gradient, results[0][2])  # DDP still averages
        assert before == after


class Encoded(nn.Module):
    """A policy on what an encoder gives, which is not its own."""

    def __init__(self, encoder: nn.Module, policy: nn.Module) -> None:
        super().__init__()
        self.encoder = [encoder]
        self.policy = policy

    def forward(self, observations: Tensor) -> Any:
        return self.policy(self.encoder[0](observations))


def encoded(rank: int, wrap: bool, frozen: bool) -> Tensor:
    """Return the policy after a step of this rank alone, on what a replicated encoder gives."""
    torch.manual_seed(0)
    encoder: nn.Module = nn.Linear(4, 4).double()
    if wrap:
        encoder = DistributedDataParallel(encoder)
    encoder.requires_grad_(not frozen)
    task = gaussian()
    optimizer = task.optimizer()
    task.policy = Encoded(encoder, task.policy)
    task.__post_init__()
    assert optimizer.step(task.closure).accepted
    return nn.utils.parameters_to_vector(optimizer.param_groups[0]["params"]).detach()


@pytest.mark.parametrize("frozen", [True, False], ids=["frozen", "trained by another"])
def test_ddp_around_a_module_that_the_step_does_not_move_needs_no_group(frozen: bool) -> None:
    expected = encoded(0, wrap=False, frozen=frozen)
    for vector in values_of(on_ranks(2, encoded, True, frozen)):
        torch.testing.assert_close(vector, expected)


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
    from torch._dynamo.testing import CompileCounter  # half a second, for this test alone

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
        assert 1 <= count <= 2 + wrap  # with and without gradients; in DDP's forward and outside


@pytest.mark.parametrize(
    ("wrap", "text"),
    [
        (
            "DDP without group",
            "the optimizer has no process_group.*process_group=ddp.process_group",
        ),
        ("zero redundancy", r"a part of the parameters.*on every rank.*process_group="),
        ("tensor parallelism of old", r"torch 2.12.1\+cpu cannot.*Use torch 2.13 or later"),
    ],
)
def test_what_cannot_be_names_the_way_out(wrap: str, text: str) -> None:
    for said in values_of(on_ranks(2, refused, wrap)):
        assert re.search(text, said)
