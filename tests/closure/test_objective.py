"""How the closure is called: grad modes, the third value, and what it writes in place."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from problems import MODES, PROBLEMS, Problem, gaussian
from torch import Tensor

from trpo_optim.curvature.second_order import NO_THIRD_VALUE


@pytest.mark.parametrize("mode", MODES)
def test_only_the_first_evaluation_builds_a_graph(mode: str) -> None:
    problem = gaussian()
    graphs = []

    def closure() -> tuple[Tensor, Tensor]:
        loss, kl = problem.closure()
        graphs.append((torch.is_grad_enabled(), loss.requires_grad, kl.requires_grad))
        return loss, kl

    with torch.no_grad():
        report = problem.proven_optimizer(mode=mode).step(closure)
    assert graphs[0] == (True, True, True)
    assert graphs[1:] == [(False, False, False)] * (report.closure_evaluations - 1)
    assert len(graphs) > 1


@pytest.mark.parametrize("third", ["distribution", "tensor", "tuple"])
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("make", PROBLEMS)
def test_a_third_value_changes_no_result(
    make: Callable[[], Problem], mode: str, third: str
) -> None:
    plain, other = make(), make()

    def closure() -> Any:
        dist = other.policy(other.observations)
        loss, kl = other.values(dist)
        values = {"distribution": dist, "tensor": loss, "tuple": (loss, [kl, dist])}
        return loss, kl, values[third]

    expected = plain.optimizer(mode=mode).step(plain.closure).as_dict()
    report = other.optimizer(mode=mode).step(closure).as_dict()
    assert report.keys() == expected.keys()
    for name in expected.keys() - {"closure_evaluations"}:
        assert report[name] == pytest.approx(expected[name], rel=1e-9, abs=1e-12)
    torch.testing.assert_close(plain.vector(), other.vector(), rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize(
    ("text", "calls"),
    [("a reader of the batch failed", 1), ("torch.func: saved tensor hooks", 2)],
)
def test_the_closures_own_error_comes_out_whatever_it_says(text: str, calls: int) -> None:
    """One that speaks as torch does is raised by the plain evaluation, which decides."""
    problem = gaussian()
    count = 0

    def closure() -> tuple[Tensor, Tensor]:
        nonlocal count
        count += 1
        raise RuntimeError(text)

    with pytest.raises(RuntimeError, match=text) as caught:
        problem.optimizer().step(closure)
    assert type(caught.value) is RuntimeError
    assert count == calls


def test_a_refusal_that_the_closure_words_anew_is_a_refusal() -> None:
    problem = gaussian()

    def closure() -> tuple[Tensor, Tensor]:
        loss, kl = problem.closure()
        try:
            loss.detach().untyped_storage()
        except NotImplementedError as error:
            raise KeyError("no storage") from error
        return loss, kl

    report = problem.optimizer().step(closure)
    assert (report.accepted, report.engine) == (True, "double backward")
    assert "no storage" in report.fallback


def test_a_third_value_of_none_counts_as_none() -> None:
    problem = gaussian()
    report = problem.optimizer().step(lambda: (*problem.closure(), None))
    assert (report.accepted, report.engine, report.fallback) == (True, "torch.func", NO_THIRD_VALUE)


def test_an_error_that_was_handled_before_the_step_tells_nothing_of_it() -> None:
    """Python links every new error to the one that is being handled."""
    problem = gaussian()

    def closure() -> tuple[Tensor, Tensor]:
        raise RuntimeError("mine")

    try:
        raise RuntimeError("functorch transforms")
    except RuntimeError:
        with pytest.raises(RuntimeError, match="mine"):
            problem.optimizer().step(closure)
