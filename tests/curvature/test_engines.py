"""Which engine differentiates a closure, what it refuses, and whose error is whose."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from linearized import (
    MIDDLES,
    REFUSED_BY_TORCH_FUNC,
    dense,
    double_backward,
    hides,
    linearized,
    torch_func,
    with_middle,
)
from networks import Checkpointed, Scale, Scaled, ScaleWithSetup
from problems import CategoricalPolicy, Problem, gaussian
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from trpo_optim import TrustRegionError
from trpo_optim.curvature.local_model import NO_THIRD_VALUE


def draws(problem: Problem) -> None:
    problem.policy = CategoricalPolicy(
        nn.Sequential(nn.Dropout(0.1), problem.policy.get_submodule("network"))
    )


def hooks(problem: Problem) -> None:
    problem.parameters()[0].register_hook(lambda grad: 2 * grad)


@pytest.mark.parametrize(
    ("change", "reason"),
    [(draws, "random numbers"), (hooks, "ignores the hooks"), (hides, "does not reach")],
)
def test_where_torch_func_would_be_silently_wrong_double_backward_serves(
    change: Callable[[Problem], None], reason: str
) -> None:
    problem = with_middle(nn.Identity())
    change(problem)
    with linearized(problem, torch_func) as (model, _):
        assert model.engine == "double backward"
        assert reason in model.fallback


@pytest.mark.parametrize("name", MIDDLES)
def test_torch_func_is_exact_or_leaves_it_to_double_backward_with_the_reason(name: str) -> None:
    problem = with_middle(MIDDLES[name]())
    with linearized(problem, torch_func) as (model, _):
        refusal = REFUSED_BY_TORCH_FUNC.get(name)
        assert model.engine == ("torch.func" if refusal is None else "double backward")
        assert NO_THIRD_VALUE in model.fallback
        assert (refusal or "") in model.fallback
        torch.testing.assert_close(dense(model), problem.dense_fisher(), rtol=0, atol=1e-10)


@pytest.mark.parametrize("name", MIDDLES)
def test_double_backward_is_exact_whatever_the_layer(name: str) -> None:
    problem = with_middle(MIDDLES[name]())
    with linearized(problem, double_backward) as (model, _):
        assert model.engine == "double backward"
        torch.testing.assert_close(dense(model), problem.dense_fisher(), rtol=0, atol=1e-10)


def test_what_refused_once_is_not_tried_again() -> None:
    problem = with_middle(nn.BatchNorm1d(6), dtype=torch.float32)
    optimizer = problem.optimizer()
    counts = []
    for seed in range(2):
        problem = Problem(problem.policy, problem.observations, seed)
        report = optimizer.step(problem.closure)
        assert report.engine == "double backward"
        assert "in-place operation" in report.fallback
        counts.append(report.closure_evaluations - report.backtracks)
    assert counts == [3, 2]


def test_engines_take_one_step() -> None:
    vectors = []
    for engine in ("Gauss-Newton", "torch.func", "double backward"):
        problem = gaussian()
        optimizer = problem.optimizer()
        if engine == "double backward":
            problem.parameters()[0].register_hook(lambda grad: grad)  # torch.func ignores hooks
        closure = problem.closure_with_dist if engine == "Gauss-Newton" else problem.closure
        assert optimizer.step(closure).engine == engine
        vectors.append(problem.vector())
    for vector in vectors[1:]:
        torch.testing.assert_close(vector, vectors[0], rtol=1e-12, atol=1e-14)


def called(closure: Callable[[], Any]) -> Any:
    return closure()


def test_a_third_value_is_learned_of_by_one_further_evaluation_and_only_once() -> None:
    """Where the code of the closure does not show it."""
    problem = gaussian()
    optimizer = problem.optimizer()
    for evaluations in (3, 2):
        problem = Problem(problem.policy, problem.observations, evaluations)
        report = optimizer.step(functools.partial(called, problem.closure_with_dist))
        assert report.engine == "Gauss-Newton"
        assert report.closure_evaluations - report.backtracks == evaluations


def test_a_closure_whose_code_misleads_is_served_all_the_same() -> None:
    problem = gaussian()
    third = False

    def closure() -> Any:
        loss, kl = problem.closure()
        if third:
            return loss, kl, None
        return loss, kl

    optimizer = problem.optimizer()
    report = optimizer.step(closure)
    assert (report.engine, report.closure_evaluations - report.backtracks) == ("torch.func", 3)


@pytest.mark.parametrize("style", [Scale, ScaleWithSetup])
def test_a_function_that_forbids_second_derivatives_is_not_taken_for_zero_curvature(
    style: type[Scale],
) -> None:
    class Once(style):  # type: ignore[valid-type, misc]  # a base per parameter
        @staticmethod
        @once_differentiable
        def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor]:
            return Scale.backward(ctx, *grads)

    problem = with_middle(Scaled(Once, 6))
    with pytest.raises(TrustRegionError, match="once_differentiable"):
        problem.optimizer().step(problem.closure)


def test_an_error_where_both_engines_refuse_names_both() -> None:
    problem = with_middle(Checkpointed(reentrant=False, width=6))  # refused by torch.func

    def closure() -> tuple[Tensor, Tensor]:
        loss, kl = problem.closure()
        weight = problem.parameters()[0]
        return loss + torch.igamma(weight.exp(), torch.ones_like(weight)).mean(), kl

    with pytest.raises(TrustRegionError, match=r"torch\.func: .*saved tensor hooks") as caught:
        problem.optimizer().step(closure)
    assert "double backward: the derivative for 'igamma: input' is not" in str(caught.value)


def test_the_closures_own_runtime_error_is_not_taken_for_a_refusal() -> None:
    problem = gaussian()
    calls = []

    def closure() -> tuple[Tensor, Tensor]:
        calls.append(1)
        if len(calls) == 1:
            raise RuntimeError("a reader of the batch failed")
        return problem.closure()

    with pytest.raises(RuntimeError, match="a reader of the batch failed"):
        problem.optimizer().step(closure)
    assert len(calls) == 1


def test_a_mistake_in_the_closure_comes_out_as_torch_words_it() -> None:
    problem = gaussian()

    def closure() -> tuple[Tensor, Tensor]:
        problem.observations @ problem.observations
        return problem.closure()

    with pytest.raises(RuntimeError, match="cannot be multiplied") as caught:
        problem.optimizer().step(closure)
    assert type(caught.value) is RuntimeError


def test_numpy_inside_the_closure_comes_out_as_torch_words_it() -> None:
    problem = gaussian()

    def closure() -> tuple[Tensor, Tensor]:
        problem.policy(problem.observations).base_dist.loc.numpy()
        return problem.closure()

    with pytest.raises(RuntimeError, match="numpy") as caught:
        problem.optimizer().step(closure)
    assert type(caught.value) is RuntimeError
