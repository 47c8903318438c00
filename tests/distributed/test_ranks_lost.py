"""What happens on all ranks when one of them dies or hangs, and what a step sends."""

from __future__ import annotations

import copy
import itertools
import os
import pickle
import signal
import time
import weakref
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from problems import Problem, Snapshot, gaussian
from ranks import on_ranks, values_of

from trpo_optim import RankError, StepReport, TrustRegionError, TrustRegionOptimizer
from trpo_optim.curvature.engine_choice import learned
from trpo_optim.distributed.collectives import Reduction

pytestmark = pytest.mark.ranks

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


def destroyed(rank: int) -> list[Any]:
    """Return what lives of a destroyed group, and what a step then says."""
    task = gaussian()
    optimizer = optimizer_of(task)
    assert optimizer.step(task.closure).accepted
    group = weakref.ref(dist.group.WORLD)
    dist.destroy_process_group()
    try:
        optimizer.step(task.closure)
    except TrustRegionError as error:
        return [group() is None, str(error)]
    raise AssertionError


def test_the_group_ends_where_it_is_destroyed_and_the_optimizer_says_so() -> None:
    for gone, text in values_of(on_ranks(2, destroyed)):
        assert gone
        assert "process_group was destroyed" in text


def struck(rank: int, at: int, blow: str, victim: int, proof: Path) -> tuple[str, str, list[str]]:
    """Take a whole step, and one in whose collective number ``at`` the victim is struck."""
    task = gaussian(samples=32)
    optimizer = optimizer_of(task, **TEN_PRODUCTS_AND_A_TRIAL)
    assert optimizer.step(task.closure).accepted
    task = Problem(task.policy, task.observations)
    if rank == victim:
        whole, calls = dist.all_reduce, itertools.count(1)

        def all_reduce(tensor: torch.Tensor, **named: Any) -> Any:
            if next(calls) == at:
                proof.touch()
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


def struck_at(blow: str, name: str) -> Any:
    """Return a case; beside a death before each collective, one within a step and at its end."""
    dear = blow != "killed before" and name not in ("first product", "conclusion")
    return pytest.param(blow, name, marks=[pytest.mark.thorough] * dear)


@pytest.mark.parametrize(
    ("blow", "name"),
    [
        struck_at(blow, name)
        for blow in ("killed before", "killed within", "hung")
        for name in COLLECTIVES
    ],
)
def test_no_rank_moves_or_waits_for_one_that_is_lost(blow: str, name: str, tmp_path: Path) -> None:
    timeout, proof, at = 3.0 if blow == "hung" else 60.0, tmp_path / "struck", COLLECTIVES[name]
    results = on_ranks(3, struck, at, blow, 1, proof, timeout=timeout, patience=60.0, lost=[1])
    survivors = values_of([results[0], results[2]])
    assert proof.exists()
    late = blow == "killed within" and at == COLLECTIVES["conclusion"]
    for first, second, changed in survivors:
        assert "Another rank was lost" in second
        if late and first == "ACCEPTED":  # all had said that they agree
            assert "network.0.weight" in changed
        else:
            assert "Another rank was lost" in first
            assert changed == []


def counted(rank: int, engines: str) -> tuple[list[str], StepReport]:
    """Return which collectives a step makes, and its report."""
    task = gaussian(samples=32)
    optimizer = optimizer_of(task, **TEN_PRODUCTS_AND_A_TRIAL)
    learned(optimizer.param_groups[0])["parts"]["proven"] = True
    calls: list[str] = []
    for name in ("all_reduce", "all_gather_object", "broadcast", "barrier"):
        whole = getattr(dist, name)

        def noting(*args: Any, name: str = name, whole: Any = whole, **named: Any) -> Any:
            calls.append(name)
            return whole(*args, **named)

        setattr(dist, name, noting)

    def third() -> Any:
        dist_ = task.policy(task.observations)
        return (*task.values(dist_), dist_)

    closure: Any = third if engines == "unlike" and rank == 0 else task.closure
    closure = [] if engines == "one without samples" and rank == 1 else closure
    report = optimizer.step(closure)
    assert (report.fisher_products, report.backtracks) == (10, 0)
    return calls, report


@pytest.mark.parametrize(
    ("engines", "more", "engine"),
    [
        ("alike", 0, "torch.func"),
        ("unlike", 1, "torch.func"),
        ("one without samples", 1, "torch.func"),
    ],
)
def test_a_step_makes_one_collective_a_product_and_five_more(
    engines: str, more: int, engine: str
) -> None:
    results = values_of(on_ranks(2, counted, engines))
    for calls, report in results:
        assert Counter(calls) == Counter({"all_reduce": 15, "all_gather_object": more})
        assert report.engine == engine
        assert report == results[0][1]


def belonging(rank: int) -> list[str]:
    """Return what is said of an optimizer that is to be copied, and of a group that cannot send."""
    found = []
    optimizer = optimizer_of(gaussian())
    for wrong in (
        lambda: pickle.dumps(optimizer),
        lambda: copy.deepcopy(optimizer),
        lambda: Reduction(dist.group.WORLD, torch.device("meta")),  # type: ignore[arg-type]  # it is one here
    ):
        with pytest.raises(TrustRegionError) as raised:
            wrong()
        found.append(str(raised.value))
    return found


def test_a_group_belongs_to_its_process_and_to_a_kind_of_device() -> None:
    ((pickled, copied, elsewhere),) = values_of(on_ranks(1, belonging))
    assert "can be neither pickled nor copied" in pickled
    assert copied == pickled
    assert "The parameters lie on meta, and the process_group serves cpu:gloo" in elsewhere
