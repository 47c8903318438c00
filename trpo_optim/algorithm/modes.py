"""The modes as rows of one table: what is differentiated, which way, how far, what is accepted.

Directions are solved for the gradient's unit vector, and a length turns one into the step. That
keeps a trust-region step free of the gradient's scale, however small.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace

from torch import Tensor

from trpo_optim.algorithm.conjugate_gradient import Solution, conjugate_gradient
from trpo_optim.algorithm.line_search import Prediction, Search, Trial, backtrack, whole_step
from trpo_optim.hyperparameters import Hyperparameters, ModeName

__all__ = ["MODES", "Mode", "natural_length", "radius_length", "vanilla_length"]

Product = Callable[[Tensor], Tensor]
"""v ↦ Fv for vectors of shape (n,)."""


@dataclass(frozen=True)
class Mode:
    """One way to take a step; another is another row of ``MODES``.

    Attributes:
        curved: Whether the local model has curvature.
        direction: Where the step goes.
        length: How far the full step goes.
        search: Which share of it is taken.
        radius_is_held: Whether the search measures the KL and holds it to the radius.
    """

    curved: bool
    direction: Callable[[Product, Tensor, Hyperparameters, Tensor | None], Solution]
    length: Callable[[Hyperparameters, float, float], float]
    search: Callable[[Callable[[float], Trial], Prediction, Hyperparameters], Search]
    radius_is_held: bool = False


def natural_direction(
    product: Product, unit: Tensor, settings: Hyperparameters, scale: Tensor | None = None
) -> Solution:
    """Return (F + λI)⁻¹ of the unit gradient, by conjugate gradient.

    Args:
        product: v ↦ Fv.
        unit: The gradient's unit vector, uphill, shape (n,).
        settings: ``damping``, ``cg_iterations``, ``cg_tolerance``.
        scale: D^−½, shape (n,). The solve is (F + λD)⁻¹ then, in the coordinates D^½x. None: D is
            the identity.

    Returns:
        The direction and its curvature.
    """

    def solve(product: Product, right_side: Tensor) -> Solution:
        return conjugate_gradient(
            product,
            right_side,
            damping=settings.damping,
            iterations=settings.cg_iterations,
            tolerance=settings.cg_tolerance,
        )

    if scale is None:
        return solve(product, unit)
    solution = solve(lambda vector: product(vector * scale).mul_(scale), unit * scale)
    return replace(solution, x=solution.x.mul_(scale))


def gradient_direction(
    product: Product,  # noqa: ARG001 (one signature for all modes)
    unit: Tensor,
    settings: Hyperparameters,  # noqa: ARG001 (one signature for all modes)
    scale: Tensor | None = None,  # noqa: ARG001 (one signature for all modes)
) -> Solution:
    """Return the unit gradient itself.

    Args:
        product: Not used.
        unit: The gradient's unit vector, uphill, shape (n,).
        settings: Not used.
        scale: Not used.

    Returns:
        The direction, without a curvature.
    """
    return Solution(unit)


def radius_length(settings: Hyperparameters, gradient_norm: float, curvature: float) -> float:  # noqa: ARG001 (one signature for all modes)
    """Return √(2δ / xᵀFx), or 0 where ``lr`` is: the line search multiplies by ``lr``.

    Args:
        settings: ``max_kl`` gives δ in nats.
        gradient_norm: Not used.
        curvature: xᵀFx > 0, undamped, of the direction solved for g/‖g‖.

    Returns:
        The factor that turns the direction into the step that fills the radius.

    Source:
        Schulman et al. (2015), appendix C, with the undamped F.
    """
    assert settings.max_kl is not None  # as the mode requires
    return math.sqrt(2 * settings.max_kl / curvature) if settings.lr > 0 else 0.0


def natural_length(settings: Hyperparameters, gradient_norm: float, curvature: float) -> float:
    """Return lr·√(2δ / xᵀFx), or with no radius lr·‖g‖.

    Args:
        settings: ``max_kl`` gives δ in nats; None stands for the fixed rate ``lr``.
        gradient_norm: ‖g‖.
        curvature: xᵀFx > 0, undamped, of the direction solved for g/‖g‖.

    Returns:
        The factor that turns the direction into the full step.

    Source:
        Kakade (2001) for the fixed rate.
    """
    if settings.max_kl is None:
        return settings.lr * gradient_norm
    return settings.lr * radius_length(settings, gradient_norm, curvature)


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


MODES: dict[ModeName, Mode] = {
    "trpo": Mode(True, natural_direction, radius_length, backtrack, radius_is_held=True),
    "natural": Mode(True, natural_direction, natural_length, whole_step),
    "vanilla": Mode(False, gradient_direction, vanilla_length, whole_step),
}
