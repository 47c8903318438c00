"""The modes as rows of one table: what is differentiated, which way, how far, what is accepted."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from trpo_optim.algorithm.conjugate_gradient import Ending, conjugate_gradient
from trpo_optim.algorithm.line_search import Prediction, Search, Trial, backtrack, whole_step
from trpo_optim.algorithm.step_length import natural_length, vanilla_length
from trpo_optim.curvature.local_model import LocalModel
from trpo_optim.hyperparameters import Hyperparameters
from trpo_optim.report import Outcome

__all__ = ["MODES", "Direction", "Mode"]


@dataclass(frozen=True)
class Direction:
    """Where a step goes, solved for the unit gradient.

    Attributes:
        vector: x, shape (n,).
        curvature: xᵀFx, undamped; NaN where the mode needs none.
        iterations: Iterations of conjugate gradient behind it.
        products: Fisher-vector products behind it.
        residual: The solve's relative residual.
        damping: λ.
        flaw: Why no step can follow it, or None.
    """

    vector: Tensor
    curvature: float = float("nan")
    iterations: int = 0
    products: int = 0
    residual: float = float("nan")
    damping: float = float("nan")
    flaw: Outcome | None = None


@dataclass(frozen=True)
class Mode:
    """One way to take a step; another is another row of ``MODES``.

    Attributes:
        curved: Whether the local model has curvature.
        direction: Where the step goes.
        length: How far.
        search: Which share of it is taken.
        radius_is_held: Whether the search measures the KL and holds it to the radius.
    """

    curved: bool
    direction: Callable[[LocalModel, Tensor, Hyperparameters], Direction]
    length: Callable[[Hyperparameters, float, float], float]
    search: Callable[[Callable[[float], Trial], Prediction, Hyperparameters], Search]
    radius_is_held: bool = False


def natural_direction(model: LocalModel, unit: Tensor, settings: Hyperparameters) -> Direction:
    """Return (F + λI)⁻¹ of the unit gradient, by conjugate gradient.

    Args:
        model: Gives the Fisher-vector products.
        unit: The gradient's unit vector, uphill, shape (n,).
        settings: ``damping``, ``cg_iterations``, ``cg_tolerance``.

    Returns:
        The direction, flawed where a product is not finite or xᵀFx is not positive.
    """
    solution = conjugate_gradient(
        model.product,
        unit,
        damping=settings.damping,
        iterations=settings.cg_iterations,
        tolerance=settings.cg_tolerance,
    )
    flaw = None
    if solution.ending is Ending.NON_FINITE:
        flaw = Outcome.NON_FINITE_CURVATURE
    elif not solution.curvature > 0:
        flaw = Outcome.NON_POSITIVE_CURVATURE
    return Direction(
        vector=solution.x,
        curvature=solution.curvature,
        iterations=solution.iterations,
        products=solution.products,
        residual=solution.residual,
        damping=solution.damping,
        flaw=flaw,
    )


def gradient_direction(
    model: LocalModel,  # noqa: ARG001 (one signature for all modes)
    unit: Tensor,
    settings: Hyperparameters,  # noqa: ARG001 (one signature for all modes)
) -> Direction:
    """Return the unit gradient itself.

    Args:
        model: Not used.
        unit: The gradient's unit vector, uphill, shape (n,).
        settings: Not used.

    Returns:
        The direction.
    """
    return Direction(unit)


MODES = {
    "trpo": Mode(True, natural_direction, natural_length, backtrack, radius_is_held=True),
    "natural": Mode(True, natural_direction, natural_length, whole_step),
    "vanilla": Mode(False, gradient_direction, vanilla_length, whole_step),
}
