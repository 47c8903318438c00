"""What keeps a step from being taken is an outcome that says so, and nothing has moved."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from faulty_closures import Change, calls_of_a_step, modes, problems, problems_and_modes, step
from problems import Problem, Snapshot, gaussian
from torch import Tensor

from trpo_optim import Outcome

NAN, INF = float("nan"), float("inf")
NUMBERS: list[tuple[Change, Outcome]] = [
    (lambda loss, kl: (loss * NAN, kl), Outcome.NON_FINITE_LOSS),
    (lambda loss, kl: (loss + INF, kl), Outcome.NON_FINITE_LOSS),
    (lambda loss, kl: (loss - INF, kl), Outcome.NON_FINITE_LOSS),
    (lambda loss, kl: (loss, kl * NAN), Outcome.NON_FINITE_KL),
    (lambda loss, kl: (loss, kl + INF), Outcome.NON_FINITE_KL),
]


@problems_and_modes
@pytest.mark.parametrize(("change", "outcome"), NUMBERS)
def test_a_number_that_is_none_withdraws_the_step_and_says_so(
    make: Callable[[], Problem], mode: str, change: Change, outcome: Outcome
) -> None:
    for at in range(1, calls_of_a_step(make, mode) + 1):
        problem = make()
        before = Snapshot.of(problem.policy)
        report, _ = step(problem, mode, change, at)
        assert before.differences(Snapshot.of(problem.policy)) == []
        assert report.outcome is (outcome if at == 1 else Outcome.NON_FINITE_TRIAL)
        assert not report.accepted
        assert (report.step_norm, report.step_scale, report.improvement) == (0, 0, 0)


def weight_of(problem: Problem) -> Tensor:
    return problem.parameters()[0][0, 0]


def assert_outcome(
    problem: Problem, mode: str, fault: Callable[[Problem], Change], outcome: Outcome
) -> None:
    """Check that a fault of every call ends in an outcome, and that nothing has moved."""
    before = Snapshot.of(problem.policy)
    report, _ = step(problem, mode, fault(problem), 0)
    assert report.outcome is outcome
    assert before.differences(Snapshot.of(problem.policy)) == []


GRADIENTS: list[tuple[str, Callable[[Problem], Change], Outcome]] = [
    (
        "NaN gradient",
        lambda problem: lambda loss, kl: (loss + (0 * weight_of(problem)).sqrt(), kl),
        Outcome.NON_FINITE_GRADIENT,
    ),
    (
        "zero gradient",
        lambda problem: lambda loss, kl: (0 * loss, kl),
        Outcome.ZERO_GRADIENT,
    ),
]


@problems_and_modes
@pytest.mark.parametrize(("fault", "outcome"), [row[1:] for row in GRADIENTS])
def test_a_gradient_that_leads_nowhere_is_an_outcome(
    make: Callable[[], Problem], mode: str, fault: Callable[[Problem], Change], outcome: Outcome
) -> None:
    assert_outcome(make(), mode, fault, outcome)


@problems
@pytest.mark.parametrize("mode", ["trpo", "natural"])
@pytest.mark.parametrize(
    ("fault", "outcome"),
    [
        (
            lambda problem: lambda loss, kl: (loss, kl + (0 * weight_of(problem)).abs().pow(1.5)),
            Outcome.NON_FINITE_CURVATURE,
        ),
        (lambda problem: lambda loss, kl: (loss, -kl), Outcome.NON_POSITIVE_CURVATURE),
    ],
)
def test_a_curvature_that_is_none_is_an_outcome(
    make: Callable[[], Problem], mode: str, fault: Callable[[Problem], Change], outcome: Outcome
) -> None:
    assert_outcome(make(), mode, fault, outcome)


def test_negative_curvature_met_on_the_way_ends_the_solve_with_the_last_good_iterate() -> None:
    problem = gaussian()
    start = problem.parameters()[1][0, 0].detach().clone()

    def closure() -> tuple[Tensor, Tensor]:
        loss, kl = problem.closure()
        weight = problem.parameters()[1][0, 0]
        return loss, kl - 2 * (weight - start).square()

    report = problem.optimizer(damping=1e-6).step(closure)
    assert 0 < report.cg_iterations < report.fisher_products
    assert report.curvature > 0
    assert report.accepted


@problems
@pytest.mark.parametrize(
    ("change", "outcome"),
    [
        (lambda loss, kl: (loss, kl + 1), Outcome.KL_ABOVE_RADIUS),
        (lambda loss, kl: (loss + 1, kl), Outcome.NO_IMPROVEMENT),
    ],
)
def test_an_exhausted_line_search_says_what_it_lacked(
    make: Callable[[], Problem], change: Change, outcome: Outcome
) -> None:
    problem = make()
    before = Snapshot.of(problem.policy)

    def closure() -> object:
        values = problem.closure()
        return values if torch.is_grad_enabled() else change(*values)

    optimizer = problem.optimizer(max_backtracks=4)
    report = optimizer.step(closure)  # type: ignore[arg-type]  # a fault returns anything
    assert report.outcome is outcome
    assert report.backtracks == 4
    assert before.differences(Snapshot.of(problem.policy)) == []
    assert report.trial_kl > 0.01 or report.trial_loss > report.loss_before
    assert report.loss_after == report.loss_before


@modes
def test_a_distribution_that_refuses_its_arguments_after_a_step_is_a_trial_that_failed(
    mode: str,
) -> None:
    problem = gaussian(dtype=torch.float32)
    before = Snapshot.of(problem.policy)

    def closure() -> tuple[Tensor, Tensor]:
        moved = problem.policy(problem.observations).base_dist.loc - problem.old.base_dist.loc  # type: ignore[attr-defined]  # Independent
        loss, _ = problem.closure()
        scale = 1 - 1e6 * moved.abs().mean()  # negative after any step
        return loss, problem.values(torch.distributions.Independent(_normal(problem, scale), 1))[1]

    def _normal(problem: Problem, scale: Tensor) -> torch.distributions.Normal:
        base = problem.policy(problem.observations).base_dist
        return torch.distributions.Normal(base.loc, base.scale * scale)

    report = problem.optimizer(mode=mode).step(closure)
    assert report.outcome is Outcome.NON_FINITE_TRIAL
    assert before.differences(Snapshot.of(problem.policy)) == []


def test_a_step_that_overflows_is_withdrawn() -> None:
    problem = gaussian(dtype=torch.float32)
    before = Snapshot.of(problem.policy)
    report = problem.optimizer(mode="vanilla", lr=1e39).step(problem.closure)
    assert report.outcome is Outcome.NON_FINITE_TRIAL
    assert before.differences(Snapshot.of(problem.policy)) == []


@modes
def test_a_learning_rate_of_zero_takes_no_step_and_says_so(mode: str) -> None:
    problem = gaussian()
    before = Snapshot.of(problem.policy)
    assert problem.optimizer(mode=mode, lr=0).step(problem.closure).outcome is (
        Outcome.ZERO_LEARNING_RATE
    )
    assert before.differences(Snapshot.of(problem.policy)) == []


@modes
def test_a_factorisation_that_fails_after_a_step_is_a_trial_that_failed(mode: str) -> None:
    problem = gaussian()
    start = problem.vector()

    def closure() -> tuple[Tensor, Tensor]:
        moved = (problem.vector() - start).norm()
        torch.linalg.cholesky(torch.eye(2, dtype=torch.float64) * (1 - 1e9 * moved))
        return problem.closure()

    report = problem.optimizer(mode=mode).step(closure)
    assert report.outcome is Outcome.NON_FINITE_TRIAL
    assert torch.equal(problem.vector(), start)
