"""How far to go along a direction: a radius in KL, a fixed rate, or an L2 ball.

Directions are solved for the gradient's unit vector; a length turns one into the step. That keeps a
trust-region step free of the gradient's scale, however small.
"""

from __future__ import annotations

import math

from trpo_optim.hyperparameters import Hyperparameters

__all__ = ["natural_length", "vanilla_length"]


def natural_length(settings: Hyperparameters, gradient_norm: float, curvature: float) -> float:
    """Return lr·√(2δ / xᵀFx), or with no radius lr·‖g‖.

    Args:
        settings: ``max_kl`` gives δ in nats; None stands for the fixed rate ``lr``.
        gradient_norm: ‖g‖.
        curvature: xᵀFx > 0, undamped, of the direction solved for g/‖g‖.

    Returns:
        The factor that turns the direction into the full step.

    Source:
        Schulman et al. (2015), appendix C, with the undamped F; Kakade (2001) for the fixed rate.
    """
    if settings.max_kl is None:
        return settings.lr * gradient_norm
    return settings.lr * math.sqrt(2 * settings.max_kl / curvature)


def vanilla_length(settings: Hyperparameters, gradient_norm: float, curvature: float) -> float:  # noqa: ARG001 (one signature for all modes)
    """Return lr·max_norm, or with no ball lr·‖g‖.

    Args:
        settings: ``max_norm`` gives the L2 length of the step; None stands for the rate ``lr``.
        gradient_norm: ‖g‖.
        curvature: Not used.

    Returns:
        The factor that turns g/‖g‖ into the full step.
    """
    return settings.lr * (gradient_norm if settings.max_norm is None else settings.max_norm)
