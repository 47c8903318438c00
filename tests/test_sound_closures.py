"""What looks like misuse and is none is taken for none."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from faulty_closures import modes
from problems import Problem, gaussian
from torch import Tensor, nn

from trpo_optim import Outcome, StepReport, TrustRegionOptimizer
from trpo_optim.testing import Verdict, check_closure


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
    report = problem.optimizer(mode=mode, max_kl=0.5).step(problem.closure)
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
