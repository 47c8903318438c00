"""Whatever goes wrong at whichever call of the closure: named, and not a bit has moved."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from problems import MODES, CategoricalPolicy, Problem, Snapshot, gaussian, give_gradients
from torch import Tensor, nn

from trpo_optim import Outcome, StepReport, TrustRegionError, TrustRegionOptimizer
from trpo_optim.testing import Verdict, check_closure

Change = Callable[[Tensor, Tensor], object]


def dropout_problem() -> Problem:
    """Return a problem with random state."""
    return _problem(nn.Dropout(0.2))


def batch_norm_problem() -> Problem:
    """Return a problem with random state and buffers that every evaluation moves."""
    return _problem(nn.Sequential(nn.BatchNorm1d(6), nn.Dropout(0.2)))


def _problem(middle: nn.Module) -> Problem:
    torch.manual_seed(3)
    network = nn.Sequential(nn.Linear(4, 6), middle, nn.Tanh(), nn.Linear(6, 3))
    problem = Problem(CategoricalPolicy(network), torch.randn(30, 4), refused="it was tried before")
    give_gradients(problem.policy)
    return problem


problems = pytest.mark.parametrize("make", [dropout_problem, batch_norm_problem])
modes = pytest.mark.parametrize("mode", MODES)


@dataclass
class Faulty:
    """A closure that changes what it returns at its n-th call."""

    problem: Problem
    change: Change
    at: int
    calls: int = field(default=0, init=False)

    def __call__(self) -> object:
        self.calls += 1
        values = self.problem.closure()
        return self.change(*values) if self.calls == self.at else values


def step(problem: Problem, mode: str, change: Change, at: int) -> tuple[StepReport, int]:
    closure = Faulty(problem, change, at)
    optimizer = problem.optimizer(mode=mode, damping=1e-3, max_kl=0.05)
    return optimizer.step(closure), closure.calls  # type: ignore[arg-type]  # a fault returns anything


def calls_of_a_step(make: Callable[[], Problem], mode: str) -> int:
    report, calls = step(make(), mode, lambda *values: values, 0)
    assert report.accepted
    assert calls >= (3 if mode == "trpo" else 2)
    return calls


NAN, INF = float("nan"), float("inf")
NUMBERS: list[tuple[Change, Outcome]] = [
    (lambda loss, kl: (loss * NAN, kl), Outcome.NON_FINITE_LOSS),
    (lambda loss, kl: (loss + INF, kl), Outcome.NON_FINITE_LOSS),
    (lambda loss, kl: (loss - INF, kl), Outcome.NON_FINITE_LOSS),
    (lambda loss, kl: (loss, kl * NAN), Outcome.NON_FINITE_KL),
    (lambda loss, kl: (loss, kl + INF), Outcome.NON_FINITE_KL),
]


@problems
@modes
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


MISUSES: list[tuple[Change, str]] = [
    (lambda loss, kl: loss, "one value"),
    (lambda loss, kl: (loss,), "1 values"),
    (lambda loss, kl: (loss, kl, kl, kl), "4 values"),
    (lambda loss, kl: None, "one value"),
    (lambda loss, kl: (loss.item(), kl), "loss is a float, not a tensor"),
    (lambda loss, kl: (loss, kl.item()), "kl is a float, not a tensor"),
    (lambda loss, kl: (loss.expand(5), kl), r"loss has shape \(5,\)"),
    (lambda loss, kl: (loss, kl.expand(2, 3)), r"kl has shape \(2, 3\)"),
    (lambda loss, kl: (loss.to(torch.complex64), kl), "loss is torch.complex64"),
    (lambda loss, kl: (loss, kl.to(torch.int64)), "kl is torch.int64"),
    (lambda loss, kl: (loss, kl, "dist"), "third value is a str"),
    (lambda loss, kl: (loss, kl, ()), "third value is a tuple"),
]


@problems
@modes
@pytest.mark.parametrize(("change", "message"), MISUSES, ids=[row[1] for row in MISUSES])
def test_a_wrong_return_is_an_error_that_names_it_at_every_call(
    make: Callable[[], Problem], mode: str, change: Change, message: str
) -> None:
    for at in range(1, calls_of_a_step(make, mode) + 1):
        problem = make()
        before = Snapshot.of(problem.policy)
        with pytest.raises(TrustRegionError, match=message):
            step(problem, mode, change, at)
        assert before.differences(Snapshot.of(problem.policy)) == []


FIRST_CALL_MISUSES: list[tuple[Change, str]] = [
    (lambda loss, kl: (loss.detach(), kl), "detached"),
    (lambda loss, kl: (loss, kl.detach()), "detached"),
    (lambda loss, kl: (loss, kl + 0.05), r"KL is 0\.05 at the current parameters"),
    (lambda loss, kl: (loss, kl - 0.05), r"KL is -0\.05 at the current parameters"),
]


@problems
@modes
@pytest.mark.parametrize(("change", "message"), FIRST_CALL_MISUSES)
def test_misuse_that_shows_at_the_current_parameters_is_an_error(
    make: Callable[[], Problem], mode: str, change: Change, message: str
) -> None:
    problem = make()
    before = Snapshot.of(problem.policy)
    with pytest.raises(TrustRegionError, match=message):
        step(problem, mode, change, 1)
    assert before.differences(Snapshot.of(problem.policy)) == []


@problems
@modes
@pytest.mark.parametrize("backward", [Tensor.backward, torch.autograd.backward])
def test_backward_inside_the_closure_is_an_error_at_every_call(
    make: Callable[[], Problem], mode: str, backward: Callable[[Tensor], None]
) -> None:
    def change(loss: Tensor, kl: Tensor) -> tuple[Tensor, Tensor]:
        backward(loss)
        return loss, kl

    for at in range(1, calls_of_a_step(make, mode) + 1):
        problem = make()
        before = Snapshot.of(problem.policy)
        with pytest.raises(TrustRegionError, match=r"called backward\(\)"):
            step(problem, mode, change, at)
        assert before.differences(Snapshot.of(problem.policy)) == []


@problems
@modes
@pytest.mark.parametrize(
    "error", [ValueError("x"), RuntimeError("x"), KeyError("x"), KeyboardInterrupt(), SystemExit()]
)
def test_what_the_closure_raises_comes_out_and_nothing_has_moved(
    make: Callable[[], Problem], mode: str, error: BaseException
) -> None:
    def change(loss: Tensor, kl: Tensor) -> object:
        raise error

    for at in range(1, calls_of_a_step(make, mode) + 1):
        problem = make()
        before = Snapshot.of(problem.policy)
        with pytest.raises(type(error)) as caught:
            step(problem, mode, change, at)
        assert caught.value is error
        assert before.differences(Snapshot.of(problem.policy)) == []


@modes
@pytest.mark.parametrize("detached", [True, False])
def test_an_old_policy_computed_inside_the_closure_is_an_error(mode: str, detached: bool) -> None:
    problem = gaussian(dtype=torch.float32)

    def closure() -> tuple[Tensor, Tensor]:
        with torch.set_grad_enabled(torch.is_grad_enabled() and not detached):
            problem.old = problem.policy(problem.observations)
        return problem.closure()

    before = Snapshot.of(problem.policy)
    with pytest.raises(TrustRegionError, match="would never bind"):
        problem.optimizer(mode=mode).step(closure)
    assert before.differences(Snapshot.of(problem.policy)) == []


def test_a_step_too_small_for_the_kl_to_show_is_not_taken_for_misuse() -> None:
    problem = gaussian(dtype=torch.float32)
    report = problem.optimizer(mode="vanilla", lr=1e-4).step(problem.closure)
    assert report.accepted
    assert abs(report.kl) < 1e-6


class Wide(nn.Module):
    """A Gaussian whose scale is fixed, and large beside what its mean may reach."""

    def __init__(self) -> None:
        super().__init__()
        self.mean = nn.Linear(4, 2)

    def forward(self, observation: Tensor) -> torch.distributions.Distribution:
        return torch.distributions.Independent(
            torch.distributions.Normal(self.mean(observation), 1e4), 1
        )


class Saturated(nn.Module):
    """A policy that has all but settled on one action."""

    def __init__(self) -> None:
        super().__init__()
        self.network = nn.Sequential(nn.Linear(4, 64), nn.Tanh(), nn.Linear(64, 2))
        with torch.no_grad():
            self.network[2].weight.mul_(0.1)  # type: ignore[operator]
            self.network[2].bias.copy_(torch.tensor([8.0, -8.0]))  # type: ignore[operator]

    def forward(self, observation: Tensor) -> torch.distributions.Distribution:
        return torch.distributions.Categorical(logits=self.network(observation))


@modes
@pytest.mark.parametrize("policy", [Wide, Saturated])
def test_a_policy_that_hardly_answers_to_its_parameters_is_not_taken_for_misuse(
    policy: type[nn.Module], mode: str
) -> None:
    torch.manual_seed(0)
    problem = Problem(policy(), torch.randn(64, 4))
    settings = {"lr": 0.1} if mode == "vanilla" else {}
    report = problem.optimizer(mode=mode, **settings).step(problem.closure)
    assert isinstance(report, StepReport)
    findings = check_closure(problem.closure, problem.parameters()).findings
    assert [each.verdict for each in findings if each.check == "moving kl"] == [Verdict.PASSED]


@modes
@pytest.mark.parametrize("leak", ["old_log_prob", "old"])
@problems
def test_an_old_policy_that_was_not_detached_is_an_error(
    make: Callable[[], Problem], mode: str, leak: str
) -> None:
    problem = make()
    state = torch.get_rng_state()
    old = problem.policy(problem.observations)
    torch.set_rng_state(state)
    setattr(problem, leak, old if leak == "old" else old.log_prob(problem.actions))
    before = Snapshot.of(problem.policy)
    with pytest.raises(TrustRegionError, match="computed before it ran"):
        problem.optimizer(mode=mode).step(problem.closure)
    assert before.differences(Snapshot.of(problem.policy)) == []


@modes
@pytest.mark.parametrize("closure", [None, 3, "closure"])
def test_a_missing_closure_is_an_error(mode: str, closure: object) -> None:
    problem = dropout_problem()
    before = Snapshot.of(problem.policy)
    with pytest.raises(TrustRegionError, match=f"got {closure!r} for its closure"):
        problem.optimizer(mode=mode).step(closure)  # type: ignore[arg-type]  # misuse on purpose
    assert before.differences(Snapshot.of(problem.policy)) == []


def weight_of(problem: Problem) -> Tensor:
    return problem.parameters()[0][0, 0]


def assert_outcome(
    problem: Problem, mode: str, fault: Callable[[Problem], Change], outcome: Outcome
) -> None:
    """Check that a fault at the first call ends in an outcome, and that nothing has moved."""
    before = Snapshot.of(problem.policy)
    report, _ = step(problem, mode, fault(problem), 1)
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


@problems
@modes
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


def test_a_value_error_of_the_closures_own_is_never_swallowed() -> None:
    problem = gaussian()

    def closure() -> tuple[Tensor, Tensor]:
        if not torch.is_grad_enabled():
            raise ValueError("no such episode")
        return problem.closure()

    with pytest.raises(ValueError, match="no such episode"):
        problem.optimizer().step(closure)


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


def joint_loss(problem: Problem, value: nn.Parameter) -> Callable[[], tuple[Tensor, Tensor]]:
    """Return a closure whose loss is mostly a critic's, which no KL can see."""

    def closure() -> tuple[Tensor, Tensor]:
        loss, kl = problem.closure()
        return loss + 0.5 * (value - 100).square(), kl

    return closure


@pytest.mark.parametrize(
    "settings",
    [
        {"mode": "vanilla", "lr": 1e-4},
        {"mode": "vanilla", "max_norm": 0.01},
        {"mode": "natural", "max_kl": None, "lr": 1e-4},
        {"mode": "trpo"},
    ],
)
@pytest.mark.parametrize("advantage", [0.0, 1.0])
def test_a_step_that_moves_what_the_kl_does_not_see_is_not_taken_for_misuse(
    settings: dict[str, Any], advantage: float
) -> None:
    problem = gaussian(dtype=torch.float32)
    problem.advantages = advantage * problem.advantages
    value = nn.Parameter(torch.zeros(()))
    optimizer = TrustRegionOptimizer([*problem.parameters(), value], **settings)
    report = optimizer.step(joint_loss(problem, value))
    assert report.outcome in (Outcome.ACCEPTED, Outcome.NON_POSITIVE_CURVATURE)


@modes
def test_a_kl_in_bfloat16_is_not_taken_for_misuse(mode: str) -> None:
    problem = gaussian(dtype=torch.float32)
    problem.policy.to(torch.bfloat16)
    problem = Problem(problem.policy, problem.observations.to(torch.bfloat16))
    report = problem.optimizer(mode=mode, max_kl=0.1).step(problem.closure)
    assert isinstance(report, StepReport)


def test_small_vanilla_steps_cost_two_evaluations() -> None:
    problem = gaussian(dtype=torch.float32)
    report = problem.optimizer(mode="vanilla", lr=1e-2).step(problem.closure)
    assert abs(report.kl) < 1e-4
    assert report.closure_evaluations == 2


def test_a_closure_that_raises_far_away_does_not_lose_a_sound_step() -> None:
    problem = gaussian(dtype=torch.float32)
    start = problem.vector()

    def closure() -> tuple[Tensor, Tensor]:
        if (problem.vector() - start).norm() > 0.01:
            raise RuntimeError("far away")
        return problem.closure()

    report = problem.optimizer(mode="vanilla", lr=1e-8).step(closure)
    assert report.accepted
    assert report.closure_evaluations == 3


class Shared(nn.Module):
    """A policy whose old distribution, made without a copy, shares memory with its parameters."""

    def __init__(self) -> None:
        super().__init__()
        self.mean = nn.Linear(4, 2)
        self.std = nn.Parameter(torch.full((2,), 0.7))

    def forward(self, observation: Tensor) -> torch.distributions.Distribution:
        mean = self.mean(observation)
        normal = torch.distributions.Normal(mean, self.std.expand_as(mean))
        return torch.distributions.Independent(normal, 1)


@modes
def test_an_old_distribution_that_shares_memory_with_a_parameter_is_an_error(mode: str) -> None:
    torch.manual_seed(0)
    problem = Problem(Shared(), torch.randn(30, 4))
    before = Snapshot.of(problem.policy)
    with pytest.raises(TrustRegionError, match=r"shares memory with a parameter.*clone\(\)"):
        problem.optimizer(mode=mode).step(problem.closure)
    assert before.differences(Snapshot.of(problem.policy)) == []
    with torch.no_grad():
        policy = problem.policy
        assert isinstance(policy, Shared)
        mean = policy.mean(problem.observations)
        cloned = torch.distributions.Normal(mean, policy.std.expand_as(mean).clone())
        problem.old = torch.distributions.Independent(cloned, 1)
        problem.old_log_prob = problem.old.log_prob(problem.actions)
    report = problem.optimizer(mode=mode, lr=0.5).step(problem.closure)
    assert report.accepted
    with torch.no_grad():
        assert problem.closure()[1].item() == report.kl


@modes
def test_views_of_parameters_made_inside_the_closure_are_no_error(mode: str) -> None:
    problem = gaussian()

    def closure() -> tuple[Tensor, Tensor]:
        loss, kl = problem.closure()
        weight = problem.parameters()[1]
        rows = [row.detach() for row in weight.T]
        penalty = sum((row.square().sum() for row in rows), torch.zeros(()))
        return loss + 0 * penalty * weight.sum(), kl

    assert problem.optimizer(mode=mode, lr=0.5).step(closure).accepted


@modes
def test_an_assignment_to_data_inside_the_closure_is_an_error(mode: str) -> None:
    problem = gaussian()
    buffer = torch.zeros(3)

    def closure() -> tuple[Tensor, Tensor]:
        buffer.data = torch.ones(3)
        return problem.closure()

    with pytest.raises(TrustRegionError, match=r"assigns to the \.data"):
        problem.optimizer(mode=mode).step(closure)
    assert not buffer.any()


@modes
@pytest.mark.parametrize("around_old", [False, True])
def test_autocast_around_the_step_does_not_hide_it_from_the_trials(
    mode: str, around_old: bool
) -> None:
    problem = gaussian(dtype=torch.float32, hidden=32)
    context = torch.autocast("cpu", dtype=torch.bfloat16)
    if around_old:
        with context:
            problem = Problem(problem.policy, problem.observations)
            report = problem.optimizer(mode=mode).step(problem.closure)
    else:
        with context:
            report = problem.optimizer(mode=mode).step(problem.closure)
    assert report.accepted
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        loss, kl = problem.closure()
    assert kl.item() == report.kl > 0
    assert loss.item() == report.loss_after


def test_hooks_on_the_parameters_gradients_are_heeded() -> None:
    problem = gaussian()
    weight = problem.parameters()[1]
    before = weight.detach().clone()
    weight.register_hook(lambda grad: grad * torch.arange(len(grad))[:, None].clamp(max=1))
    assert problem.optimizer().step(problem.closure).accepted
    assert torch.equal(weight[0], before[0])
    assert not torch.equal(weight[1], before[1])


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
