"""Parameters that a forward pass writes, and generators that nothing but a step would touch."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar

import pytest
import torch
from micro_batches import on_rows
from problems import Problem, gaussian
from torch import Tensor, nn


def clamped(write: Callable[[nn.Parameter], object]) -> Problem:
    problem = gaussian()
    log_std = problem.policy.get_parameter("log_std")
    with torch.no_grad():
        log_std.fill_(0.3)
        problem = Problem(problem.policy, problem.observations)
    inner = problem.policy.forward

    def forward(x: Tensor) -> Any:
        write(log_std)
        return inner(x)

    problem.policy.forward = forward
    return problem


def by_no_grad(log_std: nn.Parameter) -> None:
    with torch.no_grad():
        log_std.clamp_(-5, 0.31)


@pytest.mark.parametrize("third", [False, True])
@pytest.mark.parametrize("mode", ["trpo", "natural", "vanilla"])
def test_a_parameter_clamped_through_data_takes_the_step_of_one_clamped_in_place(
    mode: str, third: bool
) -> None:
    vectors = []
    for write in (by_no_grad, lambda log_std: log_std.data.clamp_(-5, 0.31)):
        problem = clamped(write)
        start = problem.policy.get_parameter("log_std").clone()
        closure = problem.closure_with_dist if third else problem.closure
        assert problem.optimizer(mode=mode, max_kl=0.1).step(closure).accepted
        moved = problem.policy.get_parameter("log_std")
        assert not torch.equal(moved, start)
        with torch.no_grad():
            moved.clamp_(-5, 0.31)
        vectors.append(problem.vector())
    torch.testing.assert_close(vectors[0], vectors[1], rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("mode", ["trpo", "natural"])
def test_what_the_closure_of_the_curvature_writes_is_no_part_of_the_step(mode: str) -> None:
    ends = []
    for writes in (False, True):
        problem = gaussian()
        log_std = problem.policy.get_parameter("log_std")
        start, values = log_std.detach().clone(), on_rows(problem, slice(0, 4))

        def curvature(
            writes: bool = writes, log_std: Any = log_std, start: Any = start, values: Any = values
        ) -> Any:
            if writes:
                log_std.data.clamp_(min=start)
            return values()

        optimizer = problem.optimizer(mode=mode, max_kl=1e-4, damping=1e-2)
        report = optimizer.step(problem.closure, curvature=curvature)
        assert report.accepted
        assert report.kl > 2 * report.predicted_kl  # so that the part is evaluated at the end
        assert (log_std < start).all()
        ends.append(problem.vector())
    assert torch.equal(*ends)


class Drawing(torch.autograd.Function):
    """The identity, whose backward draws, as a thread that samples between evaluations would."""

    drawn: ClassVar[list[float]] = []

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return 1 * x

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        Drawing.drawn.append(torch.rand(()).item())
        return grads[0]


drawing: Any = Drawing.apply


def test_a_generator_that_no_evaluation_moves_is_not_touched() -> None:
    problem = gaussian()
    Drawing.drawn.clear()

    def closure() -> Any:
        loss, kl = problem.values(problem.policy(drawing(1 * problem.observations)))
        return loss, drawing(kl)

    problem.refused = "the function has no setup_context"
    state = torch.get_rng_state()
    assert problem.optimizer().step(closure).accepted
    assert len(Drawing.drawn) > 2
    torch.set_rng_state(state)
    assert [torch.rand(()).item() for _ in Drawing.drawn] == Drawing.drawn
