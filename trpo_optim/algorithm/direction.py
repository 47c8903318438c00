"""The direction of a step, and whether the products that it rests on are what they should be."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

from torch import Tensor

from trpo_optim.algorithm.conjugate_gradient import Solution
from trpo_optim.algorithm.finite_differences import FiniteDifferences, Slope, disagreement
from trpo_optim.algorithm.interfaces import Batch, LocalModel, Parameters
from trpo_optim.algorithm.modes import Mode
from trpo_optim.hyperparameters import Hyperparameters

__all__ = ["Direction", "DirectionSolver", "differences_of"]

_FINITE_DIFFERENCES = "finite differences"


@dataclass(frozen=True)
class Direction:
    """A solved direction, and the engine whose products it was solved with.

    Attributes:
        solution: The direction.
        engine: What made the products.
        fallback: Why no better engine did, or empty.
        image: The product with the gradient's unit vector, shape (n,); None if it is to be taken on
            trust.
        safe: Whether the closure gave numbers wherever it was evaluated.
        sound: Whether the product is what a finite difference says.
    """

    solution: Solution
    engine: str
    fallback: str
    image: Tensor | None = None
    safe: bool = True
    sound: bool = True


@dataclass(frozen=True)
class DirectionSolver:
    """How the direction of one step follows from the local model.

    Attributes:
        batch: The closures.
        parameters: What the closures depend on. They are where they were after every call.
        uphill: The gradient's unit vector, shape (n,).
        mode: How a direction follows from products.
        settings: The hyperparameters.
    """

    batch: Batch
    parameters: Parameters
    uphill: Tensor
    mode: Mode
    settings: Hyperparameters

    def solve(self, model: LocalModel) -> Direction:
        """Solve with the model's products, or with finite differences where it has none.

        Args:
            model: The closures near the current parameters.

        Returns:
            The direction.
        """
        if model.engine == _FINITE_DIFFERENCES:
            return self._by_finite_differences(model, model.fallback)
        images: list[Tensor] = []
        unproven = self.mode.curved and self.batch.is_unproven()

        def product(vector: Tensor) -> Tensor:
            image = model.product(vector)
            if unproven and not images:
                images.append(image)
            return image

        solution = self.mode.direction(product, self.uphill, self.settings)
        image = images[0] if images else None
        return Direction(solution, model.engine, model.fallback, image)

    def prove(self, direction: Direction, model: LocalModel) -> Direction:
        """Compare the product along the gradient with a finite difference.

        An optimizer's first step does so. If they disagree, finite differences serve from then on.

        Args:
            direction: As it was solved.
            model: The model, released: finite differences write the parameters, which breaks its
                graph.

        Returns:
            The direction. If it is not sound, the step is to be taken from its beginning: the
            engine's gradient may be wrong, too.
        """
        if direction.image is None:
            if direction.engine == _FINITE_DIFFERENCES and self.batch.is_unproven():
                self.batch.prove("")
            return direction
        apart = disagreement(
            _slope_of(self.batch, self.parameters),
            self.uphill,
            direction.image,
            model.precision,
            model.kl_resolution,
            self.settings.max_kl,
        )
        if math.isnan(apart):
            return replace(direction, safe=False)
        flaw = ""
        if apart > 0:
            flaw = (
                f"along the gradient, the product by {direction.engine} differs from the finite "
                f"difference by {apart:.0%}: an operation has second derivatives that are not "
                "those of its first ones"
            )
        self.batch.prove(flaw)
        return replace(direction, sound=not flaw)

    def _by_finite_differences(self, model: LocalModel, reason: str) -> Direction:
        product = differences_of(self.batch, self.parameters, model).product
        solution = self.mode.direction(product, self.uphill, self.settings)
        return Direction(solution, _FINITE_DIFFERENCES, reason)


def differences_of(batch: Batch, parameters: Parameters, model: LocalModel) -> FiniteDifferences:
    """Return what makes products for a model that has none.

    Args:
        batch: The closures.
        parameters: What the closures depend on. They are where they were after every product.
        model: The closures near the current parameters.

    Returns:
        The finite differences.
    """
    return FiniteDifferences(_slope_of(batch, parameters), model.precision)


def _slope_of(batch: Batch, parameters: Parameters) -> Slope:
    def slope(vector: Tensor, length: float) -> tuple[float, Tensor]:
        parameters.move(vector, length)
        found = batch.slope()
        parameters.move(vector, 0.0)
        return found

    return slope
