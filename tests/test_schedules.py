"""Schedules that end at zero: the last step is none and says so; truly below zero is an error."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from problems import MODES, Problem, Snapshot, gaussian
from torch import Tensor, nn
from torch.distributions import kl_divergence
from torch.optim.lr_scheduler import CosineAnnealingLR, LinearLR, PolynomialLR

from trpo_optim import Outcome, TrustRegionError, TrustRegionOptimizer

ROUNDED = -1.9e-17
"""What LinearLR(end_factor=0) ends at."""

SCHEDULED: dict[str, list[dict[str, Any]]] = {
    "lr": [{"mode": mode} for mode in MODES],
    "max_kl": [{"mode": "trpo"}, {"mode": "trpo", "constraint": "max"}, {"mode": "natural"}],
    "max_norm": [{"mode": "vanilla", "max_norm": 0.1}],
}
LENGTHS = [(name, settings) for name, rows in SCHEDULED.items() for settings in rows]


def again(problem: Problem) -> Problem:
    """Return the problem with the present policy as the old one."""
    return Problem(problem.policy, problem.observations, problem.seed)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(
    "make",
    [
        lambda optimizer: LinearLR(optimizer, start_factor=1.0, end_factor=0.0, total_iters=10),
        lambda optimizer: PolynomialLR(optimizer, total_iters=10),
        lambda optimizer: CosineAnnealingLR(optimizer, T_max=10),
    ],
)
def test_the_last_update_of_a_schedule_that_ends_at_zero_takes_no_step(
    make: Any, mode: str
) -> None:
    problem = gaussian()
    optimizer = problem.optimizer(mode=mode)
    scheduler = make(optimizer)
    for _ in range(10):
        optimizer.step(again(problem).closure)
        scheduler.step()
    before = Snapshot.of(problem.policy)
    assert optimizer.param_groups[0]["lr"] < 1e-16
    assert optimizer.step(again(problem).closure).outcome is Outcome.ZERO_LEARNING_RATE
    assert before.differences(Snapshot.of(problem.policy)) == []


@pytest.mark.parametrize(("name", "settings"), LENGTHS)
@pytest.mark.parametrize("value", [0, 0.0, -0.0, ROUNDED, -1e-15])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_length_that_a_schedule_brings_to_zero_is_an_outcome(
    name: str, settings: dict[str, Any], value: float, dtype: torch.dtype
) -> None:
    problem = gaussian(dtype=dtype)
    optimizer = problem.proven_optimizer(**settings)
    optimizer.param_groups[0][name] = value
    before = Snapshot.of(problem.policy)

    def closure() -> tuple[Tensor, Tensor]:
        loss, _ = problem.closure()
        return loss, kl_divergence(problem.old, problem.policy(problem.observations))

    report = optimizer.step(closure)
    assert report.outcome is Outcome.ZERO_LEARNING_RATE
    assert "max_kl or max_norm" in report.outcome.message
    assert before.differences(Snapshot.of(problem.policy)) == []
    resumed = problem.optimizer(**settings)
    resumed.load_state_dict(optimizer.state_dict())
    assert resumed.step(closure) == report


@pytest.mark.parametrize("name", ["damping", "cg_tolerance", "improvement_ratio"])
def test_rounding_below_zero_is_zero_for_every_hyperparameter_that_may_be_zero(name: str) -> None:
    reports = []
    for value in (0.0, ROUNDED):
        problem = gaussian()
        optimizer = problem.optimizer()
        optimizer.param_groups[0][name] = value
        reports.append(optimizer.step(problem.closure))
        assert optimizer.param_groups[0][name] == 0
    assert reports[0] == reports[1]
    assert reports[0].accepted


@pytest.mark.parametrize(("name", "settings"), LENGTHS)
@pytest.mark.parametrize("value", [-1e-9, -1e-3, -1.0, -math.inf])
def test_what_is_truly_below_zero_is_refused(
    name: str, settings: dict[str, Any], value: float
) -> None:
    problem = gaussian()
    optimizer = problem.optimizer(**settings)
    optimizer.param_groups[0][name] = value
    with pytest.raises(TrustRegionError, match=f"^{name} is {value!r}; it must be"):
        optimizer.step(problem.closure)


@pytest.mark.parametrize("name", ["max_kl", "max_norm"])
def test_a_group_is_not_made_with_a_length_of_zero(name: str) -> None:
    settings: dict[str, Any] = {"mode": "vanilla", "lr": 1.0}
    group = {"params": [nn.Parameter(torch.zeros(1))], name: 0.0}
    with pytest.raises(TrustRegionError, match=f"^{name} is 0.0; .*above 0"):
        TrustRegionOptimizer([group], **settings)
