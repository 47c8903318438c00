"""What happens on all ranks when one of them parts or raises."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from problems import Problem, Snapshot, gaussian, give_gradients
from ranks import on_ranks, values_of

from trpo_optim import Outcome, RankError, TrustRegionError, TrustRegionOptimizer
from trpo_optim.algorithm.modes import MODES
from trpo_optim.closure.transaction import Transaction

pytestmark = pytest.mark.ranks


def optimizer_of(task: Problem, **settings: Any) -> TrustRegionOptimizer:
    """Return an optimizer of all ranks."""
    return task.optimizer(process_group=dist.group.WORLD, **settings)


def attempted(rank: int, prepare: Callable[..., Any], settings: dict[str, Any]) -> tuple[Any, ...]:
    """Take a step that something is wrong with, and then one without.

    Returns:
        The outcome or the error of the first, with the report or the text, what of the state it
        changed, and the outcome of the second.
    """
    task = gaussian(samples=32)
    task.policy.register_buffer("count", torch.zeros(()))
    optimizer = optimizer_of(task, **settings)
    arguments = prepare(rank, task, optimizer)
    give_gradients(task.policy)
    before = Snapshot.of(task.policy)
    try:
        report = optimizer.step(
            *arguments.get("args", [task.closure]), **arguments.get("named", {})
        )
        said: Any = (report.outcome, report)
    except (ValueError, KeyboardInterrupt) as error:
        said = (error, str(error))
    changed = before.differences(Snapshot.of(task.policy))
    arguments.get("mend", lambda: None)()
    return said, changed, optimizer.step(task.closure).outcome


def other_values(rank: int, task: Problem, optimizer: TrustRegionOptimizer) -> dict[str, Any]:
    bias = task.parameters()[1]
    if rank == 2:
        bias.data[0] = torch.nextafter(bias.data[0], torch.tensor(9.0).double())

    def mend() -> None:
        dist.broadcast(bias.data, 0)

    return {"mend": mend}


def other_settings(rank: int, task: Problem, optimizer: TrustRegionOptimizer) -> dict[str, Any]:
    optimizer.param_groups[0]["max_kl"] = 0.02 if rank == 1 else 0.01

    def mend() -> None:
        optimizer.param_groups[0]["max_kl"] = 0.01

    return {"mend": mend}


def other_shapes(rank: int, task: Problem, optimizer: TrustRegionOptimizer) -> dict[str, Any]:
    task.parameters()[1].requires_grad_(rank != 1)
    return {"mend": lambda: task.parameters()[1].requires_grad_(True)}


def invalid_settings(rank: int, task: Problem, optimizer: TrustRegionOptimizer) -> dict[str, Any]:
    if rank == 1:
        optimizer.param_groups[0]["damping"] = -1.0

    def mend() -> None:
        optimizer.param_groups[0]["damping"] = None

    return {"mend": mend}


def weights_on_one(rank: int, task: Problem, optimizer: TrustRegionOptimizer) -> dict[str, Any]:
    return {"named": {"weights": 32}} if rank == 0 else {}


def no_samples(rank: int, task: Problem, optimizer: TrustRegionOptimizer) -> dict[str, Any]:
    arguments: list[dict[str, Any]] = [{}, {"args": [[]]}, {"args": [[]]}]
    return {**arguments[rank], "named": {} if rank == 1 else {"weights": 0}}


def no_closure(rank: int, task: Problem, optimizer: TrustRegionOptimizer) -> dict[str, Any]:
    return {"args": [None]} if rank == 1 else {}


def old_policy_of_others(
    rank: int, task: Problem, optimizer: TrustRegionOptimizer
) -> dict[str, Any]:
    if rank == 1:
        with torch.no_grad():
            other = gaussian(5).policy(task.observations)
        return {
            "args": [
                lambda: (
                    task.closure()[0],
                    torch.distributions.kl_divergence(other, task.policy(task.observations)).mean(),
                )
            ]
        }
    return {}


class Failing:
    """A closure that fails at one of its evaluations on rank 1."""

    def __init__(self, at: int, error: type[BaseException] = ValueError) -> None:
        self.at = at
        self.error = error

    def __call__(self, rank: int, task: Problem, optimizer: TrustRegionOptimizer) -> dict[str, Any]:
        calls = itertools.count(1)

        def closure() -> Any:
            for count in task.policy.buffers():
                count.add_(1)
            if next(calls) == self.at and rank == 1:
                raise self.error("the batch is gone")
            return task.closure()

        return {"args": [closure]}


def another_direction(rank: int, task: Problem, optimizer: TrustRegionOptimizer) -> dict[str, Any]:
    """Have rank 1 round otherwise in the solve, as another kind of machine may."""
    usual = MODES["trpo"]

    def direction(*args: Any) -> Any:
        found = usual.direction(*args)
        return replace(found, x=found.x * (1 + 1e-15))

    MODES["trpo"] = replace(usual, direction=direction) if rank == 1 else usual
    return {"mend": lambda: MODES.update({"trpo": usual})}


def another_place(rank: int, task: Problem, optimizer: TrustRegionOptimizer) -> dict[str, Any]:
    """Have rank 1 move to another place by a step of the same figures."""
    usual = Transaction.move

    def move(self: Transaction, step: torch.Tensor, scale: float) -> None:
        usual(self, step * (1 + 1e-12) if rank == 1 else step, scale)

    setattr(Transaction, "move", move)  # noqa: B010 (typed as the method)
    return {"mend": lambda: setattr(Transaction, "move", usual)}


def other_memory(rank: int, task: Problem, optimizer: TrustRegionOptimizer) -> dict[str, Any]:
    """Have rank 2 remember other gradients, as after a checkpoint that it did not load."""
    optimizer.param_groups[0]["preconditioner"] = "diagonal"
    for each in task.parameters():
        optimizer.state[each]["gradient_rms"] = torch.full_like(each, 1.0 + rank // 2)
    return {"mend": optimizer.state.clear}


PARTED: dict[str, tuple[Callable[..., Any], str, str]] = {
    "parameters": (other_values, "all", "The parameters of rank 2 differ from the other"),
    "hyperparameters": (
        other_settings,
        "all",
        "max_kl is 0.01 on rank 0, rank 2 and 0.02 on rank 1. Give every rank the same",
    ),
    "memory": (other_memory, "all", "keeps of earlier gradients on rank 2 differs from the other"),
    "shapes": (other_shapes, "all", "shapes or types on rank 1 differ from the other ranks"),
    "invalid hyperparameters": (invalid_settings, "1", "damping"),
    "weights on one": (weights_on_one, "all", "given on rank 0 and left out on rank 1, rank 2"),
    "no samples": (no_samples, "all", "No rank has a sample"),
    "no closure": (no_closure, "1", "step() got None as its closure"),
    "another old policy": (
        old_policy_of_others,
        "all",
        "In the closure of rank 1: The closure's KL is",
    ),
    "raises at once": (Failing(1), "1", "the batch is gone"),
    "raises at a trial": (Failing(2), "1", "the batch is gone"),
    "interrupted": (Failing(1, KeyboardInterrupt), "1", "the batch is gone"),
    "interrupted at a trial": (Failing(2, KeyboardInterrupt), "1", "the batch is gone"),
    "another direction": (
        another_direction,
        "all",
        "The result of the step on rank 1 differs from the other ranks. The step was withdrawn",
    ),
    "another place": (
        another_place,
        "all",
        "The result of the step on rank 1 differs from the other ranks. The step was withdrawn",
    ),
}


def test_what_is_no_group_is_refused_where_it_is_set() -> None:
    optimizer = gaussian().optimizer()
    wrong: Any = "gloo"
    with pytest.raises(TrustRegionError, match="process_group is 'gloo', not a ProcessGroup"):
        optimizer.process_group = wrong
    assert optimizer.process_group is None


class Numbers:
    """A closure whose values on rank 1 become NaN or infinite in one way."""

    def __init__(self, where: str) -> None:
        self.where = where

    def __call__(self, rank: int, task: Problem, optimizer: TrustRegionOptimizer) -> dict[str, Any]:
        def closure() -> Any:
            loss, kl = task.closure()
            moved = float(kl) > 1e-6
            if rank == 1 and self.where == "loss":
                loss = loss * float("nan")
            if rank == 1 and self.where == "KL":
                kl = kl + float("inf")
            if rank == 1 and self.where == "gradient":
                loss = loss + (loss.detach() * 0 + loss - loss.detach()).abs().sqrt()
            if rank == 1 and self.where == "curvature":
                kl = kl + (kl - kl.detach()).abs().pow(1.5)
            if rank == 1 and self.where == "trial" and moved:
                loss = loss / 0
            return loss, kl

        return {"args": [closure]}


WHERE = ["loss", "KL", "gradient", "curvature", "trial"]


def all_attempted(rank: int) -> dict[str, tuple[Any, ...]]:
    """Attempt each in turn: after an error of all ranks they step again."""
    faults = {name: prepare for name, (prepare, *_) in PARTED.items()}
    faults |= {where: Numbers(where) for where in WHERE}
    return {name: attempted(rank, prepare, {}) for name, prepare in faults.items()}


@pytest.fixture(scope="module")
def attempts() -> list[dict[str, tuple[Any, ...]]]:
    """Return what three ranks say of every fault."""
    return values_of(on_ranks(3, all_attempted))


@pytest.mark.parametrize("name", PARTED)
def test_what_is_wrong_on_one_rank_is_an_error_on_all_and_no_rank_moves(
    name: str, attempts: list[dict[str, tuple[Any, ...]]]
) -> None:
    _, whose, text = PARTED[name]
    for rank, (said, changed, after) in enumerate(each[name] for each in attempts):
        error, message = said
        assert text in message
        assert changed == []
        assert after is Outcome.ACCEPTED
        if whose == "all":
            assert isinstance(error, TrustRegionError)
        elif rank == int(whose):
            assert not isinstance(error, RankError)
        else:
            assert isinstance(error, RankError)
            assert f"rank {whose} raised" in message
            assert error.lost == name.startswith("interrupted")


@pytest.mark.parametrize("where", WHERE)
def test_what_is_not_finite_on_one_rank_is_the_same_outcome_on_all(
    where: str, attempts: list[dict[str, tuple[Any, ...]]]
) -> None:
    (_, first), *_ = attempts[0][where]
    for (outcome, report), changed, after in (each[where] for each in attempts):
        assert outcome is Outcome[f"NON_FINITE_{where.upper()}"]
        assert report == first
        assert changed == []
        assert after is Outcome.ACCEPTED
