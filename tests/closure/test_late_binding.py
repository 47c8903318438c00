"""Closures that a loop makes read the loop's variables when they are called, after the loop."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from micro_batches import UNEVEN, on_rows
from problems import Problem, Snapshot, gaussian

from trpo_optim import Closures, TrustRegionError

Made = Callable[[Problem, Sequence[slice]], list[Callable[[], Any]]]


def lambdas(problem: Problem, chunks: Sequence[slice]) -> list[Callable[[], Any]]:
    return [lambda: on_rows(problem, rows)() for rows in chunks]  # noqa: B023 (the mistake)


def definitions(problem: Problem, chunks: Sequence[slice]) -> list[Callable[[], Any]]:
    closures: list[Callable[[], Any]] = []
    for rows in chunks:
        inner = on_rows(problem, rows)

        def closure(scale: float = 1.0, *, shift: float = 0.0) -> Any:
            loss, kl = inner()  # noqa: B023 (the mistake)
            return scale * loss + shift, kl

        closures.append(closure)
    return closures


def at_module_level(problem: Problem, chunks: Sequence[slice]) -> list[Callable[[], Any]]:
    """Return closures whose loop variable is a global, so that they capture nothing."""
    variables: dict[str, Any] = {"problem": problem, "chunks": chunks, "on_rows": on_rows}
    exec(
        "closures = []\nfor rows in chunks:\n    closures.append(lambda: on_rows(problem, rows)())",
        variables,
    )
    closures: list[Callable[[], Any]] = variables["closures"]
    return closures


@pytest.mark.parametrize("make", [lambdas, definitions, at_module_level])
@pytest.mark.parametrize("held", [False, True], ids=["a list", "Closures"])
def test_closures_that_read_the_loops_last_value_are_an_error(make: Made, held: bool) -> None:
    problem = gaussian()
    closures = make(problem, UNEVEN)
    last = on_rows(problem, UNEVEN[-1])()
    assert all(closure()[0] == last[0] for closure in closures)  # the mistake is there
    before = Snapshot.of(problem.policy)
    with pytest.raises(
        TrustRegionError, match=r"Closures 1 and 2 of 4 are one function.*lambda rows=rows"
    ):
        problem.optimizer().step(Closures(closures) if held else closures)
    assert before.differences(Snapshot.of(problem.policy)) == []


def test_a_mistake_in_some_of_the_closures_is_found_in_these() -> None:
    problem = gaussian()
    closures = [on_rows(problem, UNEVEN[0]), *lambdas(problem, UNEVEN[1:])]
    with pytest.raises(TrustRegionError, match="Closures 2 and 3 of 4"):
        problem.optimizer().step(closures)


def bound_by_default(problem: Problem, chunks: Sequence[slice]) -> list[Callable[[], Any]]:
    made = [on_rows(problem, rows) for rows in chunks]
    return [lambda inner=inner: inner() for inner in made]  # type: ignore[misc]  # no type for a default


def bound_by_keyword(problem: Problem, chunks: Sequence[slice]) -> list[Callable[[], Any]]:
    closures: list[Callable[[], Any]] = []
    for made in [on_rows(problem, rows) for rows in chunks]:

        def closure(*, inner: Callable[[], Any] = made) -> Any:
            return inner()

        closures.append(closure)
    return closures


def bound_by_partial(problem: Problem, chunks: Sequence[slice]) -> list[Callable[[], Any]]:
    def values(inner: Callable[[], Any]) -> Any:
        return inner()

    return [functools.partial(values, on_rows(problem, rows)) for rows in chunks]


def bound_by_a_function(problem: Problem, chunks: Sequence[slice]) -> list[Callable[[], Any]]:
    return [on_rows(problem, rows) for rows in chunks]


@pytest.mark.parametrize(
    "make", [bound_by_default, bound_by_keyword, bound_by_partial, bound_by_a_function]
)
def test_closures_that_are_bound_when_they_are_made_take_the_step_of_the_batch(make: Made) -> None:
    whole, parts = gaussian(), gaussian()
    settings: dict[str, Any] = {"engine": "torch.func", "damping": 1e-3, "cg_tolerance": 0.0}
    whole.optimizer(**settings).step(on_rows(whole, slice(None)))
    weights = [rows.stop - rows.start for rows in UNEVEN]
    parts.optimizer(**settings).step(make(parts, UNEVEN), weights=weights)
    for one, other in zip(whole.policy.parameters(), parts.policy.parameters(), strict=True):
        torch.testing.assert_close(one, other)


def test_one_micro_batch_may_be_given_twice() -> None:
    problem = gaussian()
    closure = on_rows(problem, UNEVEN[0])
    again = [closure, closure, on_rows(problem, UNEVEN[0]), problem.closure, problem.closure]
    assert problem.optimizer().step(again).accepted
