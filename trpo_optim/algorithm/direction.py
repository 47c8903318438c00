"""The direction of a step, and whether the products that it rests on are what they should be."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from trpo_optim.algorithm.conjugate_gradient import Solution
from trpo_optim.algorithm.finite_differences import FiniteDifferences, disagreement
from trpo_optim.algorithm.interfaces import Batch, LocalModel, Parameters
from trpo_optim.algorithm.modes import Mode
from trpo_optim.hyperparameters import Hyperparameters

__all__ = ["Direction", "direction_of"]

_FINITE_DIFFERENCES = "finite differences"


@dataclass(frozen=True)
class Direction:
    """A solved direction, and the engine whose products it was solved with.

    Attributes:
        solution: The direction.
        engine: What made the products.
        fallback: Why no better engine did, or empty.
    """

    solution: Solution
    engine: str
    fallback: str


def direction_of(
    batch: Batch,
    parameters: Parameters,
    model: LocalModel,
    uphill: Tensor,
    mode: Mode,
    settings: Hyperparameters,
) -> Direction:
    """Solve for the direction of a step.

    An optimizer's first step compares the first product, along the gradient, with a finite
    difference. If they disagree, the step is solved anew by finite differences.

    Args:
        batch: The closures.
        parameters: What the closures depend on; afterwards they are where they were.
        model: The local model. Its products are finite differences where its engine says so.
        uphill: The gradient's unit vector, shape (n,).
        mode: How a direction follows from products.
        settings: The hyperparameters.

    Returns:
        The direction.
    """
    precision = max(parameters.precision, model.kl_resolution / 10)

    def slope(vector: Tensor, length: float) -> tuple[float, Tensor]:
        parameters.move(vector, length)
        found = batch.slope()
        parameters.move(vector, 0.0)
        return found

    def by_finite_differences(reason: str) -> Direction:
        differences = FiniteDifferences(slope, precision)
        solution = mode.direction(differences.product, uphill, settings)
        return Direction(solution, _FINITE_DIFFERENCES, reason)

    if not mode.curved:
        return Direction(mode.direction(model.product, uphill, settings), model.engine, "")
    if model.engine == _FINITE_DIFFERENCES:
        return by_finite_differences(model.fallback)
    first: list[Tensor] = []

    def product(vector: Tensor) -> Tensor:
        image = model.product(vector)
        if not first:
            first.append(image)
        return image

    solution = mode.direction(product, uphill, settings)
    flaw = ""
    if batch.is_unproven():
        model = model.released()  # finite differences write the parameters, which breaks its graph
        apart = disagreement(slope, uphill, first[0], precision, model.kl_resolution)
        if apart > 0:
            flaw = (
                f"along the gradient, the product by {model.engine} differs from the finite "
                f"difference by {apart:.0%}: some operation's second derivative is not that of its "
                "first"
            )
        batch.prove(flaw)
    return (
        by_finite_differences(flaw) if flaw else Direction(solution, model.engine, model.fallback)
    )
