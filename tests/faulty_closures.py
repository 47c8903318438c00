"""Closures that go wrong at one of their calls, and the problems they are of."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass, field

import pytest
import torch
from devices import manual_seed
from problems import MODES, CategoricalPolicy, Problem, give_gradients
from torch import Tensor, nn

from trpo_optim import StepReport

Change = Callable[[Tensor, Tensor], object]


def dropout_problem() -> Problem:
    """Return a problem with random state."""
    return _problem(nn.Dropout(0.2))


def batch_norm_problem() -> Problem:
    """Return a problem with random state and buffers that every evaluation moves."""
    return _problem(nn.Sequential(nn.BatchNorm1d(6), nn.Dropout(0.2)))


def plain_problem() -> Problem:
    """Return a problem that torch.func serves."""
    problem = _problem(nn.Identity())
    problem.refused = ""
    return problem


def _problem(middle: nn.Module) -> Problem:
    manual_seed(3)
    network = nn.Sequential(nn.Linear(4, 6), middle, nn.Tanh(), nn.Linear(6, 3))
    problem = Problem(CategoricalPolicy(network), torch.randn(30, 4), refused="it was tried before")
    give_gradients(problem.policy)
    return problem


problems = pytest.mark.parametrize("make", [dropout_problem, batch_norm_problem])
modes = pytest.mark.parametrize("mode", MODES)

PROBLEM_OF = {"trpo": batch_norm_problem, "natural": dropout_problem, "vanilla": batch_norm_problem}
problems_and_modes = pytest.mark.parametrize(
    ("make", "mode"),
    [
        pytest.param(make, mode, marks=[pytest.mark.thorough] * (make is not PROBLEM_OF[mode]))
        for mode in MODES
        for make in (dropout_problem, batch_norm_problem)
    ],
)


@dataclass
class Faulty:
    """A closure that changes what it returns at its n-th call; at every one where n is 0."""

    problem: Problem
    change: Change
    at: int
    calls: int = field(default=0, init=False)

    def __call__(self) -> object:
        self.calls += 1
        values = self.problem.closure()
        return self.change(*values) if self.at in (0, self.calls) else values


def step(problem: Problem, mode: str, change: Change, at: int) -> tuple[StepReport, int]:
    closure = Faulty(problem, change, at)
    optimizer = problem.optimizer(mode=mode, damping=1e-3, max_kl=0.05, cg_iterations=5)
    return optimizer.step(closure), closure.calls  # type: ignore[arg-type]  # a fault returns anything


@functools.cache
def calls_of_a_step(make: Callable[[], Problem], mode: str) -> int:
    report, calls = step(make(), mode, lambda *values: values, 0)
    assert report.accepted
    assert calls >= (3 if mode == "trpo" else 2)
    return calls
