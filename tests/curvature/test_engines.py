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
from once_differentiable import Layer
from problems import CategoricalPolicy, Problem, gaussian
from torch import Tensor, nn

from trpo_optim.curvature.second_order import NO_THIRD_VALUE


def in_place(x: Tensor) -> Tensor:
    y = 1 * x
    y.data.mul_(1.5)
    return y


def masked(x: Tensor) -> Tensor:
    y = 1 * x
    y.data[:, 0] = -5.0
    return y


CUTS: dict[str, tuple[Callable[[Tensor], Tensor], str]] = {
    "straight through": (lambda x: x + ((8 * x).round() / 8 - x).data, "torch.func"),
    "a baseline": (lambda x: x - 0.5 * x.data, "torch.func"),
    "statistics": (lambda x: x / (x.data.std() + 1), "torch.func"),
    "detached in place": (lambda x: x / ((1 * x).detach_().std() + 1), "double backward"),
    "scaled in place": (in_place, "torch.func"),
    "written in place": (masked, "torch.func"),
}


@pytest.mark.parametrize("name", CUTS)
def test_what_is_cut_out_of_the_graph_is_cut_out_of_both_derivatives(name: str) -> None:
    change, engine = CUTS[name]
    with linearized(with_middle(Layer(change)), torch_func) as (model, _):
        products, gradient = dense(model), model.gradient
        assert model.engine == engine
    with linearized(with_middle(Layer(change)), double_backward) as (model, _):
        torch.testing.assert_close(products, dense(model), rtol=0, atol=1e-12)
        torch.testing.assert_close(gradient, model.gradient, rtol=0, atol=1e-12)


def test_a_step_under_saved_tensor_hooks_is_taken() -> None:
    problem, other = gaussian(), gaussian()
    with torch.autograd.graph.save_on_cpu():
        report = problem.optimizer().step(problem.closure)
        exact = other.optimizer(engine="double backward").step(other.closure)
    assert report.accepted
    if hasattr(torch._C._autograd, "_top_saved_tensors_default_hooks"):  # torch 2.6 has not
        assert report.engine == "finite differences"
        assert report.fallback.endswith("hooks on saved tensors")
    assert (exact.accepted, exact.engine) == (True, "double backward")


class NoMemory(torch.autograd.Function):
    """Whose backward finds no memory."""

    @staticmethod
    def forward(x: Tensor) -> Tensor:
        return 1 * x

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        pass

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        raise torch.OutOfMemoryError("CUDA out of memory")


@pytest.mark.parametrize("third", [True, False])
def test_a_lack_of_memory_is_no_refusal(third: bool) -> None:
    problem = with_middle(Layer(NoMemory.apply))
    closure = problem.closure_with_dist if third else problem.closure
    optimizer = problem.optimizer()
    with pytest.raises(torch.OutOfMemoryError):
        optimizer.step(closure)
    assert optimizer.param_groups[0]["engines"]["parts"]["refusal"] == ""


def draws(problem: Problem) -> None:
    problem.policy = CategoricalPolicy(
        nn.Sequential(nn.Dropout(0.1), problem.policy.get_submodule("network"))
    )


@pytest.mark.parametrize(
    ("change", "reason"),
    [(draws, "random numbers"), (hides, "does not reach")],
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
    optimizer = problem.proven_optimizer(max_kl=1e-4)
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
        problem.refused = "another engine is tried" if engine == "double backward" else ""
        optimizer = problem.optimizer()
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
    optimizer = problem.proven_optimizer()
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

    optimizer = problem.proven_optimizer()
    report = optimizer.step(closure)
    assert (report.engine, report.closure_evaluations - report.backtracks) == ("torch.func", 3)


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
