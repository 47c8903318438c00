"""Buffers, gradients and randomness are put back, whatever writes them."""

from __future__ import annotations

import math
import threading
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from problem_with_statistics import Statistics, small_problem, take_a_step
from problems import Problem, gaussian
from torch import Tensor, nn
from torch.nn.modules import module as module_registry

from trpo_optim import TrustRegionOptimizer
from trpo_optim.closure.evaluation import Objective
from trpo_optim.closure.parameters import ParameterVector
from trpo_optim.closure.transaction import Transaction
from trpo_optim.curvature.second_order import second_order


@pytest.mark.parametrize("rejected", [False, True])
def test_buffers_are_put_back_however_they_were_written(rejected: bool) -> None:
    problem = small_problem()
    statistics = problem.policy.get_submodule("network.1")
    assert isinstance(statistics, Statistics)
    written, replaced = statistics.written, statistics.replaced
    take_a_step(problem, rejected=rejected)
    assert statistics.written is written
    assert statistics.replaced is replaced
    assert not written.any()
    assert not replaced.any()


@torch.library.custom_op("trpo_optim_tests::bump", mutates_args={"x"})
def bump(x: Tensor) -> None:
    """Add one, in a way that the operator's name does not tell."""
    x += 1


@pytest.mark.parametrize(
    "write",
    [
        bump,
        lambda buffer: torch.ops.aten.add_.Tensor(buffer, other=torch.ones(3)),
        lambda buffer: torch.ops.aten.add.out(buffer, torch.ones(3), out=buffer),
        lambda buffer: nn.functional.hardtanh(buffer, 0.25, 0.5, inplace=True),
        lambda buffer: nn.ELU(inplace=True)(buffer),
    ],
    ids=["custom_op", "overload", "overload with out", "inplace=True", "an inplace module"],
)
def test_buffers_are_put_back_whatever_operator_wrote_them(write: Callable[[Tensor], Any]) -> None:
    problem = small_problem()
    problem.policy.register_buffer("written", torch.tensor([-1.0, 2.0, 3.0]))
    buffer = problem.policy.get_buffer("written")
    seen = []

    def closure() -> tuple[Tensor, Tensor]:
        seen.append(buffer.tolist())
        write(buffer)
        return problem.closure()

    assert problem.optimizer(damping=1e-3).step(closure).accepted
    assert len(seen) > 1
    assert [*seen, buffer.tolist()] == [[-1.0, 2.0, 3.0]] * (len(seen) + 1)


def test_what_a_closure_made_and_wrote_is_not_kept_when_it_has_gone() -> None:
    problem = small_problem()
    made: list[weakref.ref[Any]] = []

    def closure() -> tuple[Tensor, Tensor]:
        assert not any(each() for each in made)
        scratch = torch.zeros(100).add_(1)
        made.append(weakref.ref(scratch.untyped_storage()))
        return problem.closure()

    report = problem.optimizer(damping=1e-3).step([closure, closure])
    assert report.accepted
    assert len(made) == report.closure_evaluations - 1 > 4  # torch.func has no storages: refused


def test_every_evaluation_sees_the_buffers_that_the_step_began_with() -> None:
    problem = small_problem()
    seen = []
    statistics = problem.policy.get_submodule("network.1")
    assert isinstance(statistics, Statistics)
    statistics.register_forward_pre_hook(
        lambda module, _: seen.append((module.written.sum().item(), module.replaced.sum().item()))
    )
    report = take_a_step(problem)
    assert len(seen) == report.closure_evaluations >= 2
    assert set(seen) == {(0.0, 0.0)}


def draws_other_numbers(graph: torch.fx.GraphModule, inputs: Any) -> Callable[..., Any]:
    """Compile as inductor does, in that dropout draws another mask than uncompiled."""

    def compiled(*args: Any) -> Any:
        torch.rand(7)
        return graph(*args)

    return compiled


@pytest.mark.usefixtures("compiler")
def test_every_evaluation_of_a_compiled_policy_sees_one_dropout_mask() -> None:
    plain, compiled = small_problem(), small_problem()
    compiled.policy.compile(backend=draws_other_numbers)
    report, expected = take_a_step(compiled), take_a_step(plain)
    assert report == expected
    assert torch.equal(compiled.vector(), plain.vector())


def test_buffers_of_modules_that_other_threads_use_are_left_alone() -> None:
    problem = small_problem()
    other = Statistics()

    def closure() -> tuple[Tensor, Tensor]:
        thread = threading.Thread(target=other, args=(torch.zeros(1),))
        thread.start()
        thread.join()
        return problem.closure()

    report = problem.optimizer().step(closure)
    assert other.replaced[0] == report.closure_evaluations


def test_gradients_are_the_same_objects_and_are_hidden_from_the_closure() -> None:
    problem = small_problem()
    grads = [each.grad for each in problem.parameters()]
    inside: list[Tensor | None] = []

    def closure() -> tuple[Tensor, Tensor]:
        inside.extend(each.grad for each in problem.parameters())
        return problem.closure()

    assert problem.optimizer().step(closure).accepted
    assert all(grad is None for grad in inside)
    assert all(each.grad is grad for each, grad in zip(problem.parameters(), grads, strict=True))


@pytest.mark.parametrize(
    "context",
    [torch.no_grad, torch.enable_grad, torch.inference_mode],
    ids=lambda each: each.__name__,
)
@pytest.mark.parametrize("mode", ["trpo", "natural", "vanilla"])
def test_the_callers_grad_mode_changes_nothing(context: Callable[[], Any], mode: str) -> None:
    plain, other = small_problem(), small_problem()
    take_a_step(plain, mode=mode)
    with context():
        enabled = torch.is_grad_enabled()
        take_a_step(other, mode=mode)
        assert torch.is_grad_enabled() == enabled
    assert torch.equal(plain.vector(), other.vector())


def test_parameters_that_the_loss_does_not_reach_are_not_even_written() -> None:
    problem, critic = gaussian(), nn.Linear(4, 1).double()
    value = critic(problem.observations).square().mean()
    versions = [each._version for each in critic.parameters()]
    optimizer = TrustRegionOptimizer([*problem.parameters(), *critic.parameters()])
    assert optimizer.step(problem.closure).accepted
    problem = Problem(problem.policy, problem.observations)
    report = optimizer.step(lambda: (problem.closure()[0] * math.nan, problem.closure()[1]))
    assert not report.accepted
    assert [each._version for each in critic.parameters()] == versions
    value.backward()  # its graph was made before the step


def test_parameters_are_written_in_place() -> None:
    problem = small_problem()
    places = [(id(each), each.data_ptr(), each._version) for each in problem.parameters()]
    take_a_step(problem)
    for parameter, (identity, place, version) in zip(problem.parameters(), places, strict=True):
        assert (id(parameter), parameter.data_ptr()) == (identity, place)
        assert parameter._version > version


def test_an_evaluation_leaves_no_hook_on_modules_even_if_the_transaction_has_not_begun() -> None:
    problem = gaussian()
    hooks = dict(module_registry._global_forward_pre_hooks)
    vector = ParameterVector(problem.parameters())
    with Transaction(vector) as transaction:
        second_order(Objective(problem.closure, vector, transaction))
        assert module_registry._global_forward_pre_hooks == hooks
