"""Parameters sharded by FSDP2: what goes wrong on one rank is told to all."""

from __future__ import annotations

import os
import re
import signal
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
from fsdp_policies import core_of, half, sharded, task_of, vector_of
from problems import Problem
from ranks import on_ranks, values_of
from torch import Tensor
from torch.distributions import Normal, kl_divergence

from trpo_optim import Outcome, RankError, TrustRegionError

pytestmark = [
    pytest.mark.ranks,
    pytest.mark.no_cover,
    pytest.mark.skipif(torch.__version__ < "2.13", reason="refused"),
]


TRIAL = -1
"""Stands for the first evaluation without derivatives."""


def at_fault(task: Problem, closure: Any, place: str, turn: int) -> Callable[[], Any]:
    """Return a closure that raises at one of its evaluations."""
    calls, left = 0, 1

    def raise_now(*_: Any) -> None:
        nonlocal left
        if left and (calls == turn or (turn == TRIAL and not torch.is_grad_enabled())):
            left = 0
            raise OSError("simulator lost")

    blocks = core_of(task).blocks
    if place == "within":
        blocks[0].layer.register_forward_hook(raise_now)

    def faulty() -> Any:
        nonlocal calls
        calls += 1
        if place == "before":
            raise_now()
        values = closure()
        if place == "after":
            raise_now()
        return values

    return faulty


def detached(_: Problem, closure: Any, place: str, turn: int) -> Callable[[], Any]:
    """Return a closure with a value that cannot be differentiated at one of its evaluations."""
    calls = 0
    other = torch.zeros((), dtype=torch.float64, requires_grad=True)

    def faulty() -> Any:
        nonlocal calls
        calls += 1
        loss, kl, new = closure()
        if calls == turn and place == "loss":
            loss = loss.detach()
        elif calls == turn and place == "KL":
            kl = kl.detach()
        elif calls == turn and place == "KL of another tensor":
            kl = kl.detach() + other
        elif calls == turn:
            mean, std = new.base_dist.loc, new.base_dist.scale
            old = Normal(mean.detach(), std.detach())
            kl = kl_divergence(old, Normal(mean, std.detach())).sum(-1).mean()
        return loss, kl

    return faulty


def struck(rank: int, fault: Any, place: str, turn: int, at: int) -> tuple[str, bool, Tensor]:
    """Return what a step says if one rank errs, whether it moved, and where the next one ends."""
    task = sharded(task_of())
    optimizer = task.optimizer(process_group=dist.group.WORLD)
    parameters: list[Any] = task.parameters()
    closure = half(task, rank)
    before = [each.to_local().clone() for each in parameters]
    said = "nothing"
    try:
        optimizer.step([fault(task, closure, place, turn) if rank == at else closure, closure])
    except (TrustRegionError, OSError) as error:
        said = f"{type(error).__name__}: {error}"
    still = all(map(torch.equal, before, [each.to_local() for each in parameters]))
    optimizer.step(half(task, rank))
    return said, still, vector_of(task.policy)


def unharmed(rank: int) -> Tensor:
    """Return where the step ends without a fault."""
    task = sharded(task_of())
    task.optimizer(process_group=dist.group.WORLD).step(half(task, rank))
    return vector_of(task.policy)


@pytest.mark.parametrize(
    ("place", "turn"),
    [("before", 1), ("within", 1), ("within", 5), ("after", 2), ("within", TRIAL)],
    ids=lambda each: str(each),
)
def test_an_error_on_one_rank_is_told_to_all_and_loses_nothing(place: str, turn: int) -> None:
    expected, _ = values_of(on_ranks(2, unharmed))
    first, second = values_of(on_ranks(2, struck, at_fault, place, turn, 1))
    assert first[0].startswith("RankError: The step failed on another rank")
    assert "rank 1 raised OSError: simulator lost" in first[0]
    assert second[0] == "OSError: simulator lost"
    for _, still, vector in (first, second):
        assert still
        torch.testing.assert_close(vector, expected, rtol=1e-5, atol=1e-7)  # by one side or both


_DETACHED = "does not depend on the optimizer's parameters"
WITHOUT_DERIVATIVES = [
    ("loss", 1, 1, _DETACHED),
    ("KL", 1, 1, _DETACHED),
    ("KL", 3, 1, _DETACHED),
    ("KL of another tensor", 3, 1, _DETACHED),
    ("KL without the scale", 1, 0, "parameters that the KL does not depend on"),
]


def struck_by_each(rank: int) -> list[tuple[str, bool, Tensor]]:
    """Return what steps say in which a value of one rank cannot be differentiated."""
    cases = WITHOUT_DERIVATIVES
    return [struck(rank, detached, place, turn, at) for place, turn, at, _ in cases]


def test_a_value_without_derivatives_on_one_rank_is_told_to_all() -> None:
    expected, _ = values_of(on_ranks(2, unharmed))
    for rank, found in enumerate(values_of(on_ranks(2, struck_by_each))):
        for (said, still, vector), (*_, at, text) in zip(found, WITHOUT_DERIVATIVES, strict=True):
            told = f"RankError: The step failed on another rank.*rank {at} raised .*{text}"
            assert re.match(f"TrustRegionError: .*{text}" if rank == at else told, said), said
            assert still
            torch.testing.assert_close(vector, expected, rtol=1e-5, atol=1e-7)  # as above


def lost(rank: int) -> tuple[bool, bool]:
    """Return whether the survivor of a killed rank says so, and whether it has moved."""
    task = sharded(task_of())
    optimizer = task.optimizer(process_group=dist.group.WORLD)
    parameters: list[Any] = task.parameters()
    before = [each.to_local().clone() for each in parameters]
    closure, calls = half(task, rank), 0

    def deadly() -> Any:
        nonlocal calls
        calls += 1
        if rank == 1 and calls == 5:
            os.kill(os.getpid(), signal.SIGKILL)
        return closure()

    try:
        optimizer.step(deadly)
    except RankError as error:
        still = map(torch.equal, before, [each.to_local() for each in parameters])
        return error.lost, all(still)
    raise AssertionError


def test_no_rank_moves_if_another_is_killed() -> None:
    survivor, _ = on_ranks(2, lost, lost=[1])
    assert values_of([survivor]) == [(True, True)]


def overflown(rank: int, place: str) -> tuple[Outcome, Tensor]:
    """Return how a step ends in which a value of rank 1 is no number, and how the next moves."""
    task = sharded(task_of())
    optimizer = task.optimizer(process_group=dist.group.WORLD)
    closure = half(task, rank)
    calls = 0

    def overflowing() -> Any:
        nonlocal calls
        calls += 1
        trial = not torch.is_grad_enabled()
        refuses = rank == 1 and calls > 1 and trial == place.startswith("trial")
        nan = torch.tensor(float("nan"), dtype=torch.float64)
        if refuses and place.endswith("before"):
            Normal(nan, 1.0)
        loss, kl, _ = closure()
        if refuses and place.endswith("after"):
            Normal(nan, 1.0)
        return loss, kl * nan if refuses else kl

    outcome = optimizer.step(overflowing).outcome
    optimizer.step(half(task, rank))
    return outcome, vector_of(task.policy)


@pytest.mark.parametrize(
    ("place", "outcome"),
    [
        ("trial before", Outcome.NON_FINITE_TRIAL),
        ("product after", Outcome.NON_FINITE_CURVATURE),
        ("product", Outcome.NON_FINITE_CURVATURE),
        pytest.param("trial after", Outcome.NON_FINITE_TRIAL, marks=pytest.mark.thorough),
        pytest.param("trial", Outcome.NON_FINITE_TRIAL, marks=pytest.mark.thorough),
        pytest.param("product before", Outcome.NON_FINITE_CURVATURE, marks=pytest.mark.thorough),
    ],
)
def test_an_overflow_on_one_rank_ends_the_step_of_all(place: str, outcome: Outcome) -> None:
    expected, _ = values_of(on_ranks(2, unharmed))
    for found, vector in values_of(on_ranks(2, overflown, place)):
        assert found is outcome
        torch.testing.assert_close(vector, expected, rtol=1e-5, atol=1e-7)  # by one side or both
