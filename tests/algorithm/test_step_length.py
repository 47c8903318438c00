"""Step lengths against what they promise: the radius in KL, the ball, the rate."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from trpo_optim import TrustRegionOptimizer
from trpo_optim.algorithm.modes import natural_length, vanilla_length
from trpo_optim.hyperparameters import Hyperparameters


def settings(**values: Any) -> Hyperparameters:
    optimizer = TrustRegionOptimizer([torch.zeros(1)], **{"lr": 1.0, **values})
    return Hyperparameters(**optimizer.defaults)


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
        {"mode": "trpo"},
        {"mode": "natural"},
        {"mode": "natural", "max_kl": None},
        {"mode": "vanilla"},
        {"mode": "vanilla", "max_norm": 3.0},
    ],
)
def test_the_learning_rate_multiplies_every_length(values: dict[str, Any], lr: float) -> None:
    length = vanilla_length if values["mode"] == "vanilla" else natural_length
    whole = length(settings(**values), 2.0, 5.0)
    assert whole > 0
    assert length(settings(lr=lr, **values), 2.0, 5.0) == lr * whole


def test_vanilla_lengths_ignore_the_radius() -> None:
    small, large = (settings(mode="vanilla", max_kl=max_kl) for max_kl in (1e-6, 1.0))
    assert vanilla_length(small, 2.0, math.nan) == vanilla_length(large, 2.0, math.nan)


def test_the_smallest_curvature_gives_a_long_step_and_no_error() -> None:
    assert natural_length(settings(), 1.0, math.nextafter(0.0, 1.0)) > 1e150
