"""What happens on all ranks when one of them parts, raises, dies or hangs."""

from __future__ import annotations

import itertools
import os
import signal
import time
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
from problems import Problem, Snapshot, gaussian, give_gradients
from ranks import on_ranks, values_of

from trpo_optim import Outcome, RankError, TrustRegionError, TrustRegionOptimizer

TEN_PRODUCTS_AND_A_TRIAL = {"cg_tolerance": 0.0, "max_backtracks": 0, "lr": 0.5}

COLLECTIVES = {
    "agreement": 1,
    "model": 2,
    "gradient": 3,
    "first product": 4,
    "last product": 13,
    "first trial": 14,
    "conclusion": 15,
}
"""Which one of a step's collectives each is; the last is the step's last."""


def optimizer_of(task: Problem, **settings: Any) -> TrustRegionOptimizer:
    """Return an optimizer of all ranks."""
    return task.optimizer(process_group=dist.group.WORLD, **settings)


def attempted(rank: int, prepare: Callable[..., Any], settings: dict[str, Any]) -> tuple[Any, ...]:
    """Take a step that something is wrong with, and then one without.

    Returns:
        The outcome or the error of the first, what of the state it changed, and the outcome of the
        second.
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
    except TrustRegionError as error:
        said = (type(error), str(error))
    except ValueError as error:
        said = (type(error), str(error))
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
    return {"args": [[]]} if rank else {"named": {"weights": 0}}


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

    def __init__(self, at: int) -> None:
        self.at = at

    def __call__(self, rank: int, task: Problem, optimizer: TrustRegionOptimizer) -> dict[str, Any]:
        calls = itertools.count(1)

        def closure() -> Any:
            for count in task.policy.buffers():
                count.add_(1)
            if next(calls) == self.at and rank == 1:
                raise ValueError("the batch is gone")
            return task.closure()

        return {"args": [closure]}


PARTED: dict[str, tuple[Callable[..., Any], str, str]] = {
    "parameters": (other_values, "all", "The parameters of rank 2 are not those of the other"),
    "hyperparameters": (
        other_settings,
        "all",
        "max_kl is 0.01 on rank 0, rank 2 and 0.02 on rank 1. Give every rank the same",
    ),
    "shapes": (other_shapes, "all", "shapes or types on rank 1 are not those of the other ranks"),
    "invalid hyperparameters": (invalid_settings, "1", "damping"),
    "weights on one": (weights_on_one, "all", "given on rank 0 and left out on rank 1, rank 2"),
    "no samples": (no_samples, "all", "No rank has a sample"),
    "no closure": (no_closure, "1", "step() got None for its closure"),
    "another old policy": (
        old_policy_of_others,
        "all",
        "In the closure of rank 1: The closure's KL is",
    ),
    "raises at once": (Failing(1), "1", "the batch is gone"),
    "raises at a trial": (Failing(2), "1", "the batch is gone"),
}


@pytest.mark.parametrize("name", PARTED)
def test_what_is_wrong_on_one_rank_is_an_error_on_all_and_no_rank_moves(name: str) -> None:
    prepare, whose, text = PARTED[name]
    for rank, (said, changed, after) in enumerate(values_of(on_ranks(3, attempted, prepare, {}))):
        kind, message = said
        assert text in message
        assert changed == []
        assert after is Outcome.ACCEPTED
        if whose == "all":
            assert issubclass(kind, TrustRegionError)
        elif rank == int(whose):
            assert kind is not RankError
        else:
            assert kind is RankError
            assert f"rank {whose} raised" in message


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


@pytest.mark.parametrize("where", ["loss", "KL", "gradient", "curvature", "trial"])
def test_what_is_not_finite_on_one_rank_is_the_same_outcome_on_all(where: str) -> None:
    results = values_of(on_ranks(3, attempted, Numbers(where), {}))
    for (outcome, report), changed, after in results:
        assert outcome is Outcome[f"NON_FINITE_{where.upper()}"]
        assert report == results[0][0][1]
        assert changed == []
        assert after is Outcome.ACCEPTED


def struck(rank: int, at: int, blow: str, victim: int) -> tuple[str, str, list[str]]:
    """Take a step in whose collective number ``at`` the victim is struck."""
    task = gaussian(samples=32)
    optimizer = optimizer_of(task, **TEN_PRODUCTS_AND_A_TRIAL)
    if rank == victim:
        whole, calls = dist.all_reduce, itertools.count(1)

        def all_reduce(tensor: torch.Tensor, **named: Any) -> Any:
            if next(calls) == at:
                if blow == "killed within":
                    whole(tensor, async_op=True, **named)
                    time.sleep(0.05)
                os.kill(os.getpid(), signal.SIGSTOP if blow == "hung" else signal.SIGKILL)
            return whole(tensor, **named)

        setattr(dist, "all_reduce", all_reduce)  # noqa: B010 (typed as the function)
    before = Snapshot.of(task.policy)
    return (
        said(optimizer, task),
        said(optimizer, task),
        before.differences(Snapshot.of(task.policy)),
    )


def said(optimizer: TrustRegionOptimizer, task: Problem) -> str:
    """Return what a step comes to."""
    try:
        return optimizer.step(task.closure).outcome.name
    except RankError as error:
        return str(error)


@pytest.mark.parametrize("at", COLLECTIVES.values(), ids=COLLECTIVES)
@pytest.mark.parametrize("blow", ["killed before", "killed within", "hung"])
def test_no_rank_moves_or_waits_for_one_that_is_lost(blow: str, at: int) -> None:
    timeout = 2.0 if blow == "hung" else 60.0
    results = on_ranks(3, struck, at, blow, 1, timeout=timeout, patience=60.0, lost=[1])
    survivors = values_of([results[0], results[2]])
    late = blow == "killed within" and at == COLLECTIVES["conclusion"]
    for first, second, changed in survivors:
        assert "Another rank was lost" in second
        if late and first == "ACCEPTED":  # all had said that they agree
            assert "network.0.weight" in changed
        else:
            assert "Another rank was lost" in first
            assert changed == []


def counted(rank: int) -> int:
    """Return how many collectives a step makes."""
    task = gaussian(samples=32)
    optimizer = optimizer_of(task, **TEN_PRODUCTS_AND_A_TRIAL)
    whole, calls = dist.all_reduce, itertools.count()

    def all_reduce(tensor: torch.Tensor, **named: Any) -> Any:
        next(calls)
        return whole(tensor, **named)

    setattr(dist, "all_reduce", all_reduce)  # noqa: B010 (typed as the function)
    report = optimizer.step(task.closure)
    assert (report.fisher_products, report.backtracks) == (10, 0)
    return next(calls)


def test_a_step_makes_one_collective_a_product_and_five_more() -> None:
    assert values_of(on_ranks(2, counted)) == [15, 15]
