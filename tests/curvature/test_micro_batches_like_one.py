"""Micro-batches, which finite differences serve, end and leave things as one batch does."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from micro_batches import on_rows
from problems import Problem, gaussian
from torch import Tensor

QUARTERS = [slice(16 * index, 16 * index + 16) for index in range(4)]


@pytest.mark.usefixtures("compiler")
@pytest.mark.parametrize("engine", ["auto", "Gauss-Newton", "double backward", "torch.func"])
def test_compiled_micro_batches_have_exact_products(engine: str) -> None:
    problem, twin = gaussian(dtype=torch.float32), gaussian(dtype=torch.float32)
    problem.policy.compile(backend="aot_eager")
    for each in (problem, twin):
        closures = [on_rows(each, chunk, third=True) for chunk in QUARTERS]
        assert each.optimizer(engine=engine).step(closures).accepted
    torch.testing.assert_close(problem.vector(), twin.vector(), rtol=0, atol=1e-5)


@pytest.mark.parametrize("chunks", [[slice(0, 64)], QUARTERS])
def test_what_a_closure_collects_holds_no_graph(chunks: list[slice]) -> None:
    problem = gaussian()
    entropies: list[Tensor] = []

    def on(rows: slice) -> Callable[[], Any]:
        closure = on_rows(problem, rows, third=True)

        def collects() -> Any:
            values = closure()
            entropies.append(values[2].entropy().mean())
            return values

        return collects

    for engine in ("auto", "finite differences"):
        problem.optimizer(engine=engine, max_kl=1e-3).step([on(rows) for rows in chunks])
        problem = Problem(problem.policy, problem.observations, 1)
    assert len(entropies) > 15
    assert not any(each.requires_grad for each in entropies)


@pytest.mark.parametrize("chunks", [[slice(0, 64)], QUARTERS])
def test_a_loss_that_is_no_number_near_by_is_a_trial_that_is_not_finite(
    chunks: list[slice],
) -> None:
    problem = gaussian()
    before = problem.vector()

    def on(rows: slice) -> Callable[[], Any]:
        closure = on_rows(problem, rows, third=True)

        def nan_elsewhere() -> Any:
            loss, *others = closure()
            return (loss if torch.equal(problem.vector(), before) else loss * math.nan, *others)

        return nan_elsewhere

    assert problem.optimizer().step([on(rows) for rows in chunks]).outcome.value == (
        "non_finite_trial"
    )
    assert torch.equal(problem.vector(), before)


@pytest.mark.parametrize("chunks", [[slice(0, 64)], QUARTERS])
@pytest.mark.parametrize("mode", ["trpo", "natural"])
def test_a_first_step_with_a_radius_of_zero_takes_no_step(chunks: list[slice], mode: str) -> None:
    problem = gaussian()
    optimizer = problem.optimizer(mode=mode)
    optimizer.param_groups[0]["max_kl"] = 0.0
    report = optimizer.step([on_rows(problem, rows, third=True) for rows in chunks])
    assert report.outcome.value == "zero_learning_rate"
