"""The diagonal preconditioner: its direction by a dense solve, its memory, and what it may cost."""

from __future__ import annotations

import copy
import io
import math
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from devices import each_device
from micro_batches import on_rows
from problems import PROBLEMS, Problem, Snapshot, categorical, gaussian
from solves import N, right_side, spd, with_eigenvalues
from taken import settings, taken
from torch import Tensor

from trpo_optim import Outcome, TrustRegionError, TrustRegionOptimizer
from trpo_optim.algorithm.modes import natural_direction
from trpo_optim.algorithm.preconditioner import FLOOR, DiagonalPreconditioner

EXACT = {"cg_iterations": 200, "cg_tolerance": 1e-13}
DIAGONAL: dict[str, Any] = {"preconditioner": "diagonal"}


def roots_of(gradients: list[Tensor], decay: float) -> Tensor:
    """Return the root of the running mean of squares, the gradients' mean square being 1."""
    squares = [g.square() / g.square().mean() for g in gradients]
    mean = squares[0]
    for each in squares[1:]:
        mean = decay * mean + (1 - decay) * each
    return mean.sqrt()


@each_device
@pytest.mark.parametrize("make", PROBLEMS)
@pytest.mark.parametrize("mode", ["trpo", "natural"])
def test_the_first_step_goes_along_the_dense_solution_damped_by_the_gradient(
    make: Callable[..., Problem], mode: str, device: str
) -> None:
    problem = make(device=device)
    gradient, fisher = problem.dense_gradient(), problem.dense_fisher()
    diagonal = torch.diag(roots_of([gradient], 0.9) + FLOOR)
    x = -torch.linalg.solve(fisher + 0.1 * diagonal, gradient)
    move, report = taken(problem, mode=mode, damping=0.1, max_kl=1e-4, **EXACT, **DIAGONAL)
    curvature = float(x @ fisher @ x)
    expected = report.step_scale * math.sqrt(2 * 1e-4 / curvature) * x
    torch.testing.assert_close(move, expected, rtol=1e-6, atol=1e-12)
    assert report.curvature == pytest.approx(curvature, rel=1e-6)
    assert report.kl <= 1e-4 or mode == "natural"


def test_the_memory_is_the_running_mean_of_squared_gradients() -> None:
    gradients = list(torch.randn(3, 50, dtype=torch.float64))
    roots = torch.full((50,), torch.nan, dtype=torch.float64)
    for index, gradient in enumerate(gradients, start=1):
        preconditioner = DiagonalPreconditioner(roots, 0.7)
        scale = preconditioner.scale(gradient / gradient.norm())
        roots = preconditioner.roots
        expected = roots_of(gradients[:index], 0.7)
        torch.testing.assert_close(roots, expected, rtol=1e-12, atol=0)
        torch.testing.assert_close(scale, (expected + FLOOR).rsqrt(), rtol=1e-12, atol=0)


def test_parameters_on_different_scales_need_fewer_products() -> None:
    scales = torch.logspace(-2, 2, N, dtype=torch.float64)
    even = with_eigenvalues(torch.linspace(1, 3, N, dtype=torch.float64))
    f, b = scales[:, None] * even * scales, scales * right_side()
    counts = []
    for scale in (None, 1 / scales):
        wanted = settings(damping=0.0, cg_iterations=200, cg_tolerance=1e-6)
        solution = natural_direction(f.mv, b, wanted, scale)
        assert solution.residual < 1e-6
        counts.append(solution.products)
    assert counts[1] < 0.5 * counts[0]


def test_without_a_scale_the_solve_is_the_plain_one() -> None:
    f, b = spd(100.0), right_side()
    ones = torch.ones_like(b)
    plain, scaled = (natural_direction(f.mv, b, settings(), each) for each in (None, ones))
    torch.testing.assert_close(plain.x, scaled.x, rtol=1e-12, atol=1e-14)


def further(problem: Problem, optimizer: TrustRegionOptimizer, steps: range) -> Tensor:
    """Take a step on each of several batches; return the parameters."""
    for step in steps:
        optimizer.step(Problem(problem.policy, problem.observations, step).closure_with_dist)
    return problem.vector()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_a_resumed_run_continues_bit_for_bit(dtype: torch.dtype) -> None:
    problem = categorical(dtype=dtype)
    optimizer = problem.optimizer(max_kl=0.5, **DIAGONAL)
    further(problem, optimizer, range(3))
    saved = io.BytesIO()
    torch.save(optimizer.state_dict(), saved)
    resumed = copy.deepcopy(problem)
    other = resumed.optimizer(max_kl=0.5)
    other.load_state_dict(torch.load(io.BytesIO(saved.getvalue()), weights_only=True))
    expected = further(problem, optimizer, range(3, 6))
    assert torch.equal(further(resumed, other, range(3, 6)), expected)


def test_a_step_depends_on_the_gradients_before_it() -> None:
    ends = []
    for decay in (0.0, 0.9):
        problem = gaussian()
        optimizer = problem.optimizer(**DIAGONAL, preconditioner_decay=decay)
        further(problem, optimizer, range(2))
        ends.append(problem.vector())
    assert not torch.equal(*ends)


def test_a_rejected_step_leaves_the_memory_as_it_was() -> None:
    problem = gaussian()
    optimizer = problem.optimizer(**DIAGONAL)
    further(problem, optimizer, range(1))
    before = {each: own["gradient_rms"].clone() for each, own in optimizer.state.items()}

    def broken() -> Any:
        loss, kl, dist = Problem(problem.policy, problem.observations, 5).closure_with_dist()
        return (loss if torch.is_grad_enabled() else loss + torch.nan), kl, dist

    assert optimizer.step(broken).outcome is not Outcome.ACCEPTED
    assert before.keys() == optimizer.state.keys()
    for each, own in before.items():
        assert torch.equal(optimizer.state[each]["gradient_rms"], own)


@pytest.mark.parametrize("factor", [1e-6, 1e6])
def test_the_scale_of_the_loss_changes_nothing(factor: float) -> None:
    ends = []
    for times in (1.0, factor):
        problem = gaussian()
        optimizer = problem.optimizer(**DIAGONAL)
        for step in range(2):
            batch = Problem(problem.policy, problem.observations, step)

            def closure(batch: Problem = batch, times: float = times) -> Any:
                loss, kl, dist = batch.closure_with_dist()
                return times * loss, kl, dist

            assert optimizer.step(closure).accepted
        ends.append(problem.vector())
    torch.testing.assert_close(*ends, rtol=1e-6, atol=1e-9)


def test_parameters_that_join_later_begin_with_their_own_gradient() -> None:
    problem = gaussian()
    first, *others = problem.parameters()
    for each in others:
        each.requires_grad_(False)
    optimizer = problem.optimizer(**DIAGONAL)
    further(problem, optimizer, range(1))
    assert set(optimizer.state) == {first}
    for each in others:
        each.requires_grad_(True)
    further(problem, optimizer, range(1, 2))
    assert set(optimizer.state) == set(problem.parameters())
    assert all(own["gradient_rms"].isfinite().all() for own in optimizer.state.values())


def test_micro_batches_take_the_step_of_the_whole_batch() -> None:
    whole, parts = gaussian(), gaussian()
    move, report = taken(whole, **DIAGONAL)
    start = parts.vector()
    quarters = [slice(16 * index, 16 * index + 16) for index in range(4)]
    optimizer = parts.optimizer(**DIAGONAL)
    other = optimizer.step([on_rows(parts, each, third=True) for each in quarters])
    assert (report.engine, other.engine) == ("torch.func", "finite differences")
    cosine = torch.cosine_similarity(parts.vector() - start, move, 0)
    assert float(cosine) > 0.9999


def test_vanilla_keeps_no_memory() -> None:
    problem = gaussian()
    optimizer = problem.optimizer(mode="vanilla", lr=0.1, **DIAGONAL)
    further(problem, optimizer, range(1))
    assert not optimizer.state


def test_a_memory_of_other_shapes_is_refused() -> None:
    problem = gaussian()
    optimizer = problem.optimizer(**DIAGONAL)
    further(problem, optimizer, range(1))
    saved = optimizer.state_dict()
    (index,) = [i for i, each in enumerate(problem.parameters()) if each.shape == (6, 4)]
    saved["state"][index]["gradient_rms"] = torch.ones(4, 6)
    with pytest.raises(TrustRegionError, match=rf"of parameter {index} has shape \(4, 6\)"):
        problem.optimizer(**DIAGONAL).load_state_dict(saved)


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda each: pickle.loads(pickle.dumps(each))])
def test_copies_of_an_optimizer_remember(copied: Callable[[Any], Any]) -> None:
    problem = gaussian()
    optimizer = problem.optimizer(**DIAGONAL)
    further(problem, optimizer, range(2))
    other, twin = copied((problem, optimizer))
    expected = further(problem, optimizer, range(2, 4))
    assert torch.equal(further(other, twin, range(2, 4)), expected)


def test_the_state_stays_one_object_and_room_is_made_on_request() -> None:
    problem = gaussian()
    optimizer = problem.optimizer(**DIAGONAL)
    state = optimizer.state
    optimizer.param_groups[0]["lr"] = 0.0
    optimizer.step()
    assert {own["gradient_rms"].isnan().all().item() for own in state.values()} == {True}
    optimizer.param_groups[0]["lr"] = 1.0
    further(problem, optimizer, range(1))
    assert optimizer.state is state
    assert all(own["gradient_rms"].isfinite().all() for own in state.values())


def test_an_interrupt_while_the_memory_is_prepared_undoes_the_step(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    problem = gaussian()
    optimizer = problem.optimizer(**DIAGONAL)
    further(problem, optimizer, range(1))
    policy, state = Snapshot.of(problem.policy), copy.deepcopy(optimizer.state_dict()["state"])

    def interrupted(*_: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("trpo_optim.optimizer.to_remember", interrupted)
    with pytest.raises(KeyboardInterrupt):
        further(problem, optimizer, range(1, 2))
    assert policy.differences(Snapshot.of(problem.policy)) == []
    torch.testing.assert_close(optimizer.state_dict()["state"], state, rtol=0, atol=0)
