"""Direction and length of each mode, against dense solutions and closed forms."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from devices import each_device
from problems import MODES, PROBLEMS, Problem, gaussian
from taken import settings, taken
from torch import Tensor, nn
from torch.distributions import Categorical

from trpo_optim.algorithm.modes import natural_length, radius_length, vanilla_length

EXACT = {"cg_iterations": 200, "cg_tolerance": 1e-13}

makers = pytest.mark.parametrize("make", PROBLEMS)


def dense_direction(problem: Problem, damping: float) -> tuple[Tensor, Tensor]:
    """Return -(F + λI)⁻¹ g by a dense solve, and F."""
    fisher = problem.dense_fisher()
    damped = fisher + damping * torch.eye(len(fisher)).to(fisher)
    return -torch.linalg.solve(damped, problem.dense_gradient()), fisher


@each_device
@makers
@pytest.mark.parametrize("damping", [0.1, 1e-3])
def test_trpo_goes_along_the_dense_solution_by_the_undamped_length(
    make: Callable[..., Problem], damping: float, device: str
) -> None:
    problem = make(device=device)
    x, fisher = dense_direction(problem, damping)
    move, report = taken(problem, damping=damping, max_kl=1e-4, **EXACT)
    curvature = float(x @ fisher @ x)
    expected = math.sqrt(2 * 1e-4 / curvature) * x
    torch.testing.assert_close(move, report.step_scale * expected, rtol=1e-6, atol=1e-12)
    assert report.curvature == pytest.approx(curvature, rel=1e-6)


@makers
def test_natural_is_trpo_without_its_line_search(make: Callable[[], Problem]) -> None:
    problem = make()
    x, fisher = dense_direction(problem, 0.1)
    move, report = taken(problem, mode="natural", max_kl=0.5, damping=0.1, **EXACT)
    expected = math.sqrt(2 * 0.5 / float(x @ fisher @ x)) * x
    torch.testing.assert_close(move, expected, rtol=1e-6, atol=1e-12)
    assert report.step_scale == 1
    assert report.predicted_kl == pytest.approx(0.5)


@each_device
@makers
def test_natural_without_a_radius_takes_lr_times_the_direction(
    make: Callable[..., Problem], device: str
) -> None:
    problem = make(device=device)
    x, _ = dense_direction(problem, 0.1)
    move, _ = taken(problem, mode="natural", max_kl=None, lr=0.3, damping=0.1, **EXACT)
    torch.testing.assert_close(move, 0.3 * x, rtol=1e-6, atol=1e-12)


@each_device
@makers
def test_vanilla_takes_lr_times_the_gradient(make: Callable[..., Problem], device: str) -> None:
    problem = make(device=device)
    gradient = problem.dense_gradient()
    move, report = taken(problem, mode="vanilla", lr=0.3)
    torch.testing.assert_close(move, -0.3 * gradient, rtol=1e-10, atol=1e-14)
    assert report.fisher_products == 0
    assert math.isnan(report.curvature)


@makers
def test_vanilla_with_max_norm_fills_the_ball(make: Callable[[], Problem]) -> None:
    problem = make()
    gradient = problem.dense_gradient()
    move, report = taken(problem, mode="vanilla", max_norm=0.2)
    torch.testing.assert_close(move, -0.2 * gradient / gradient.norm(), rtol=1e-10, atol=1e-14)
    assert report.step_norm == pytest.approx(0.2)


class Tabular(nn.Module):
    """Logits by state, of which few are seen."""

    def __init__(self, *, sparse: bool) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.table = nn.Embedding(50, 3, sparse=sparse)

    def forward(self, states: Tensor) -> Categorical:
        return Categorical(logits=self.table(states))


@pytest.mark.parametrize("mode", MODES)
def test_sparse_gradients_give_the_same_step(mode: str) -> None:
    steps = []
    for sparse in (False, True):
        policy = Tabular(sparse=sparse)
        steps.append(taken(Problem(policy, torch.arange(20)), mode=mode)[0])
    assert steps[0].norm() > 0
    torch.testing.assert_close(*steps)


@makers
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("max_kl", [1e-4, 0.01, 0.5])
def test_lr_multiplies_the_step(make: Callable[..., Problem], mode: str, max_kl: float) -> None:
    whole, _ = taken(make(), mode=mode, max_kl=max_kl, improvement_ratio=0.0)
    for lr in (0.99, 0.9, 0.5, 0.01):
        part, report = taken(make(), mode=mode, max_kl=max_kl, improvement_ratio=0.0, lr=lr)
        torch.testing.assert_close(part, lr * whole, rtol=1e-10, atol=1e-14)
        assert report.kl <= max_kl or mode != "trpo"


@pytest.mark.parametrize("mode", MODES)
def test_maximize_raises_what_minimizing_its_negative_lowers(mode: str) -> None:
    down, up = gaussian(), gaussian()

    def raised() -> tuple[Tensor, Tensor]:
        loss, kl = up.closure()
        return -loss, kl

    move, report = taken(down, mode=mode)
    before = up.vector()
    mirrored = up.optimizer(mode=mode, maximize=True).step(raised)
    assert torch.equal(up.vector() - before, move)
    assert mirrored.improvement == report.improvement > 0
    assert mirrored.loss_after - mirrored.loss_before == mirrored.improvement


@pytest.mark.parametrize("mode", ["trpo", "natural"])
@pytest.mark.parametrize("max_kl", [1e-6, 0.01, 2.0])
@pytest.mark.parametrize("damping", [0.0, 0.1, 10.0])
def test_the_quadratic_model_of_the_step_lies_on_the_radius(
    mode: str, max_kl: float, damping: float
) -> None:
    generator = torch.Generator().manual_seed(0)
    root, g = torch.randn(2, 6, 6, generator=generator, dtype=torch.float64)
    f = root @ root.T
    x = torch.linalg.solve(f + damping * torch.eye(6, dtype=torch.float64), g[0])
    chosen = settings(mode=mode, max_kl=max_kl, damping=damping)
    step = natural_length(chosen, float(g[0].norm()), float(x @ f @ x)) * x
    assert 0.5 * float(step @ f @ step) == pytest.approx(max_kl, rel=1e-12)


@pytest.mark.parametrize("gradient_norm", [1e-30, 1.0, 1e30])
def test_a_radius_or_a_ball_makes_the_step_free_of_the_gradients_scale(
    gradient_norm: float,
) -> None:
    radius, ball = settings(max_kl=0.02), settings(mode="vanilla", max_norm=3.0)
    expected = math.sqrt(2 * 0.02 / 5.0)
    assert natural_length(radius, gradient_norm, 5.0) == pytest.approx(expected, rel=1e-15)
    assert vanilla_length(ball, gradient_norm, math.nan) == 3.0


@pytest.mark.parametrize("gradient_norm", [1e-3, 1.0, 7.0])
def test_without_a_radius_or_a_ball_the_step_is_the_rate_times_the_gradient(
    gradient_norm: float,
) -> None:
    natural = settings(mode="natural", max_kl=None, lr=0.5)
    vanilla = settings(mode="vanilla", lr=0.5)
    assert natural_length(natural, gradient_norm, 5.0) == 0.5 * gradient_norm
    assert vanilla_length(vanilla, gradient_norm, math.nan) == 0.5 * gradient_norm


@pytest.mark.parametrize("lr", [0.0, 0.25, 1.0, 2.0])
@pytest.mark.parametrize(
    "values",
    [
        {"mode": "natural"},
        {"mode": "natural", "max_kl": None},
        {"mode": "vanilla"},
        {"mode": "vanilla", "max_norm": 3.0},
    ],
)
def test_the_learning_rate_multiplies_every_length_that_no_search_fits(
    values: dict[str, Any], lr: float
) -> None:
    length = vanilla_length if values["mode"] == "vanilla" else natural_length
    whole = length(settings(**values), 2.0, 5.0)
    assert whole > 0
    assert length(settings(lr=lr, **values), 2.0, 5.0) == lr * whole


def test_with_a_search_the_length_is_that_of_the_radius_for_every_learning_rate_but_zero() -> None:
    lengths = [radius_length(settings(lr=lr), 2.0, 5.0) for lr in (0.0, 1e-300, 0.25, 1.0, 2.0)]
    assert lengths == [0.0, *[math.sqrt(2 * 0.01 / 5.0)] * 4]


def test_vanilla_takes_many_steps_on_one_batch_whatever_the_radius() -> None:
    problem, twin = gaussian(), gaussian()
    optimizer = problem.optimizer(mode="vanilla", lr=0.5, max_kl=1e-6)
    kls = [optimizer.step(problem.closure).kl for _ in range(5)]
    assert 1e-3 < kls[0] < kls[-1]
    other = twin.optimizer(mode="vanilla", lr=0.5)
    assert [other.step(twin.closure).kl for _ in range(5)] == kls


def test_vanilla_lengths_ignore_the_radius() -> None:
    small, large = (settings(mode="vanilla", max_kl=max_kl) for max_kl in (1e-6, 1.0))
    assert vanilla_length(small, 2.0, math.nan) == vanilla_length(large, 2.0, math.nan)


def test_the_smallest_curvature_gives_a_long_step_and_no_error() -> None:
    assert natural_length(settings(), 1.0, math.nextafter(0.0, 1.0)) > 1e150
