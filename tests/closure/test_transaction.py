"""A step is whole or nothing, wherever it is interrupted."""

from __future__ import annotations

import math
import sys
import threading
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

import pytest
import torch
from problems import CategoricalPolicy, Problem, Snapshot, gaussian, give_gradients, switches
from profiles import problems
from torch import Tensor, nn
from torch.nn.modules import module as module_registry

import trpo_optim
from trpo_optim import StepReport, TrustRegionOptimizer
from trpo_optim.closure import torch_switches

PACKAGE = str(Path(trpo_optim.__file__).parent)


class Statistics(nn.Module):
    """Writes one buffer in every way there is, and replaces another."""

    written: Tensor
    replaced: Tensor

    def __init__(self) -> None:
        super().__init__()
        for name in ("written", "replaced"):
            self.register_buffer(name, torch.zeros(3))

    def forward(self, x: Tensor) -> Tensor:
        self.written += 1
        self.written.mul_(2)
        self.written[0] = 5
        self.written[:2].add_(3)
        self.written.data.mul_(0.9)
        torch.add(self.written, 1, out=self.written)
        self.replaced = self.replaced + 1
        return x


def small_problem() -> Problem:
    torch.manual_seed(0)
    network = nn.Sequential(nn.Linear(2, 3), Statistics(), nn.Dropout(0.2), nn.Linear(3, 2))
    problem = Problem(CategoricalPolicy(network), torch.randn(6, 2))
    give_gradients(problem.policy)
    return problem


def take_a_step(problem: Problem, *, rejected: bool = False, mode: str = "trpo") -> StepReport:
    def closure() -> tuple[Tensor, Tensor]:
        loss, kl = problem.closure()
        return loss, (kl if torch.is_grad_enabled() or not rejected else kl * float("nan"))

    optimizer = problem.optimizer(mode=mode, cg_iterations=1, damping=1e-3)
    report = optimizer.step(closure)
    assert report.accepted is not rejected
    return report


@contextmanager
def interrupted_at_line(number: int, seen: list[tuple[str, int]]) -> Iterator[None]:
    """Raise KeyboardInterrupt before the n-th line that the package executes."""

    def trace(frame: FrameType, event: str, argument: Any) -> Any:
        if not frame.f_code.co_filename.startswith(PACKAGE):
            return None
        if event == "line":
            seen.append((frame.f_code.co_filename, frame.f_lineno))
            if len(seen) == number:
                raise KeyboardInterrupt
        return trace

    before = sys.gettrace()
    sys.settrace(trace)
    try:
        yield
    finally:
        sys.settrace(before)


def lines_of_a_step(rejected: bool, mode: str) -> list[tuple[str, int]]:
    seen: list[tuple[str, int]] = []
    with interrupted_at_line(-1, seen):
        take_a_step(small_problem(), rejected=rejected, mode=mode)
    return seen


OTHER_STEPS = [(True, "trpo"), (False, "vanilla"), (True, "vanilla")]


def worth_interrupting(lines: list[tuple[str, int]]) -> list[int]:
    """Return the first and the last time that each line runs, by number."""
    first = {line: index + 1 for index, line in reversed(list(enumerate(lines)))}
    last = {line: index + 1 for index, line in enumerate(lines)}
    return sorted({*first.values(), *last.values()})


@pytest.mark.parametrize(
    ("rejected", "mode", "only_new"),
    [
        (False, "trpo", False),
        *((*variant, True) for variant in OTHER_STEPS),
        *(pytest.param(*variant, False, marks=pytest.mark.thorough) for variant in OTHER_STEPS),
    ],
)
def test_an_interrupt_before_any_line_leaves_the_old_state_or_the_whole_step(
    rejected: bool, mode: str, only_new: bool
) -> None:
    """Of the other steps, only before the lines that an accepted one of TRPO does not run."""
    finished = small_problem()
    take_a_step(finished, rejected=rejected, mode=mode)
    after = Snapshot.of(finished.policy)
    hooks = dict(module_registry._global_buffer_registration_hooks)
    lines = lines_of_a_step(rejected, mode)
    numbers = worth_interrupting(lines)
    assert len(numbers) > 150
    if only_new:
        known = {*lines_of_a_step(rejected=False, mode="trpo")}
        numbers = [number for number in numbers if lines[number - 1] not in known]
        assert numbers
    numbers = numbers[:: max(1, 100 // problems())]
    outcomes = set()
    for number in numbers:
        problem = small_problem()
        before = Snapshot.of(problem.policy)
        seen: list[tuple[str, int]] = []
        with pytest.raises(KeyboardInterrupt), interrupted_at_line(number, seen):
            take_a_step(problem, rejected=rejected, mode=mode)
        now = Snapshot.of(problem.policy)
        changed = before.differences(now)
        if "switches" in changed and seen[-1][0] == torch_switches.__file__:
            changed.remove("switches")  # nothing puts back what a line should that was interrupted
            torch.backends.mha.set_fastpath_enabled(True)
            torch.compiler.set_stance("default")
            assert before.switches == switches()
        if changed:
            parameters = {name for name, _ in problem.policy.named_parameters()}
            assert set(changed) <= parameters, (seen[-1], changed)
            assert torch.equal(problem.vector(), finished.vector()), seen[-1]
        outcomes.add(bool(changed))
        assert module_registry._global_buffer_registration_hooks == hooks, seen[-1]
    assert False in outcomes or only_new
    assert after.training == Snapshot.of(finished.policy).training


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
    buffer = torch.tensor([-1.0, 2.0, 3.0])
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
