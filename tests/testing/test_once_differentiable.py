"""What torch differentiates once is sound, and the kit says by what a step differentiates it."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from broken import Bag, Policy
from broken_kls import Applied, Once
from linearized import with_middle
from once_differentiable import Layer, Opaque
from problems import Problem
from torch import Tensor, nn

from trpo_optim.testing import Verdict, check_closure, check_policy


@pytest.mark.parametrize(
    ("make", "seen", "reason"),
    [
        (Bag, lambda: torch.randint(10, (64, 4)), "embedding_bag"),
        (lambda: Policy(middle=Applied(Once)), lambda: torch.randn(64, 5), "once_differentiable"),
    ],
)
def test_a_policy_passes_with_the_reason(
    make: Callable[[], nn.Module], seen: Callable[[], Tensor], reason: str
) -> None:
    torch.manual_seed(0)
    report = check_policy(make(), seen())
    assert report.passed, str(report)
    assert "By finite differences" in report["second order"].cause
    assert reason in report["second order"].cause


def test_a_closure_passes_with_the_reason() -> None:
    torch.manual_seed(0)
    problem = Problem(Bag(), torch.randint(10, (64, 4)))
    report = check_closure(problem.closure, problem.parameters())
    assert report["second order"].verdict is Verdict.PASSED
    assert "finite differences: torch cannot" in report["second order"].cause


def test_a_closure_whose_backward_leaves_torch_is_said_to_go_by_finite_differences() -> None:
    problem = with_middle(Layer(Opaque.apply))
    report = check_closure(problem.closure, problem.parameters())
    assert report["second order"].verdict is Verdict.PASSED
    assert "differs from the finite difference" in report["second order"].cause


def test_a_critics_loss_in_the_closure_is_found() -> None:
    problem, critic = with_middle(nn.Identity()), nn.Linear(4, 1).double()

    def closure() -> tuple[Tensor, Tensor]:
        loss, kl = problem.closure()
        return loss + 0.5 * critic(problem.observations).square().mean(), kl

    parameters = [*problem.parameters(), *critic.parameters()]
    report = check_closure(closure, parameters)
    assert not report.passed
    assert "critic with its own optimizer" in report["second order"].cause
