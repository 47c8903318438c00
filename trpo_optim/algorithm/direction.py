"""The direction of a step, and a check of the products that it was computed from."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from trpo_optim.algorithm.conjugate_gradient import Ending, Solution
from trpo_optim.algorithm.disagreement import disagreement
from trpo_optim.algorithm.finite_differences import (
    EVEN,
    FiniteDifferences,
    Slope,
    UnresolvedError,
    resolves,
)
from trpo_optim.algorithm.interfaces import Batch, LocalModel, Numbers, Parameters
from trpo_optim.algorithm.kl_checks import require_moving_kl
from trpo_optim.algorithm.modes import Mode
from trpo_optim.hyperparameters import Hyperparameters
from trpo_optim.long_vectors import norm

__all__ = ["Direction", "DirectionSolver", "differences_of", "elsewhere"]

_FINITE_DIFFERENCES = "finite differences"

_SILENT = 0.01
"""The share of a product that finite differences may find where the KL does not answer at all."""


@dataclass(frozen=True)
class Direction:
    """A solved direction, and the engine whose products it was solved with.

    Attributes:
        solution: The direction.
        engine: What made the products.
        fallback: Why no better engine did, or empty.
        image: The product with the gradient's unit vector, shape (n,), to be compared with a finite
            difference; None if an earlier step has compared one.
        safe: Whether the closure gave numbers wherever it was evaluated.
        settled: Whether the step may go on. If not, it begins anew, with another engine.
    """

    solution: Solution
    engine: str
    fallback: str
    image: Tensor | None = None
    safe: bool = True
    settled: bool = True


@dataclass(frozen=True)
class DirectionSolver:
    """How the direction of one step follows from the local model.

    Attributes:
        batch: The closures.
        parameters: What the closures depend on. They are where they were after every call.
        uphill: The gradient's unit vector, shape (n,).
        mode: How a direction follows from products.
        settings: The hyperparameters.
        scale: D^−½ of the preconditioner, shape (n,); None without one.
    """

    batch: Batch
    parameters: Parameters
    uphill: Tensor
    mode: Mode
    settings: Hyperparameters
    scale: Tensor | None = None

    def solve(self, model: LocalModel) -> Direction:
        """Solve with the model's products, or with finite differences where it has none.

        Args:
            model: The closures near the current parameters.

        Returns:
            The direction.
        """
        if model.engine == _FINITE_DIFFERENCES:
            return self._by_finite_differences(model)
        unproven = self.mode.curved and self.batch.is_unproven()
        if unproven and self._differences_are_next(model):
            image = model.product(self.uphill)
            return Direction(Solution(self.uphill), model.engine, model.fallback, image)
        images: list[Tensor] = []

        def product(vector: Tensor) -> Tensor:
            image = model.product(vector)
            if unproven and not images:
                images.append(image)
            return image

        solution = self.mode.direction(product, self.uphill, self.settings, self.scale)
        if unproven and self.scale is not None:  # the first product was not along the gradient
            images = [model.product(self.uphill)]
        return Direction(solution, model.engine, model.fallback, images[0] if images else None)

    def prove(self, direction: Direction, model: LocalModel) -> Direction:
        """Compare the product along the gradient with a finite difference.

        An optimizer's first step does so. If they disagree, finite differences serve from then on.

        Args:
            direction: As it was solved.
            model: The model, released: finite differences write the parameters, which breaks its
                graph.

        Returns:
            The direction. If it is not settled, the step begins anew: the engine's gradient may be
            wrong, too, or only now is it known whether finite differences serve instead.
        """
        if direction.image is None:
            if direction.engine == _FINITE_DIFFERENCES and self.batch.is_unproven():
                self.batch.prove("", smooth=None)
            return direction
        apart, measured = disagreement(
            _slope_of(self.batch, self.parameters),
            self.uphill,
            direction.image,
            model.precision,
            model.kl_resolution,
            self.settings.max_kl,
            self.parameters.rounding,
        )
        if math.isnan(apart):
            return replace(direction, safe=False)
        flaw = ""
        if apart > 0:
            self._require_answering(direction.image, measured, model)
            flaw = (
                f"along the gradient, the product by {direction.engine} differs from the finite "
                f"difference by {apart:.0%}: an operation has second derivatives that are not "
                "those of its first ones"
            )
        following = self._differences_are_next(model)
        smooth = False if self.batch.prefers_differences() else None
        if following and not flaw:
            smooth = self._differences_serve(direction.image, model)
        self.parameters.move(self.uphill, 0.0)
        self.batch.prove(flaw, smooth=smooth)
        return replace(direction, settled=not (flaw or following))

    def _require_answering(self, image: Tensor, measured: Tensor, model: LocalModel) -> None:
        """Check that the KL answers to every parameter in which only the product curves.

        It does not where a part of the old policy is computed inside the closure.

        Raises:
            TrustRegionError: If it stays where it is however far that parameter moves.
        """
        blocks = self.parameters.blocks
        for index, pair in enumerate(zip(blocks(image), blocks(measured), strict=True)):
            stated, found = map(float, map(norm, pair))
            if stated > 0 and found <= _SILENT * stated:
                moves = f"parameter {self.parameters.name(index)} moves"
                values = elsewhere(self.batch, self.parameters, index)
                require_moving_kl(model.kl, values, model.kl_resolution, moves)

    def _differences_serve(self, image: Tensor, model: LocalModel) -> bool:
        """Return whether finite differences give the product with the gradient's unit vector."""
        try:
            made = differences_of(self.batch, self.parameters, model, preferred=True)
            apart = made.product(self.uphill) - image
        except UnresolvedError:
            return False
        self.batch.learn_sides(one_serves=made.balanced)
        return bool(norm(apart) <= EVEN * norm(image))

    def _differences_are_next(self, model: LocalModel) -> bool:
        """Return whether finite differences are to serve if they agree with the product."""
        return self.batch.prefers_differences() and resolves(model.precision)

    def _by_finite_differences(self, model: LocalModel) -> Direction:
        preferred, one_sided = self.batch.prefers_differences(), self.batch.one_side_serves()
        unsettled = Direction(Solution(self.uphill), model.engine, model.fallback, settled=False)
        try:
            made = differences_of(
                self.batch, self.parameters, model, preferred=preferred, one_sided=one_sided
            )
            solution = self.mode.direction(made.product, self.uphill, self.settings, self.scale)
        except UnresolvedError:
            if one_sided:
                self.batch.learn_sides(one_serves=False)
            elif preferred:
                self.batch.prove("", smooth=False)
            else:
                raise
            return unsettled
        finally:
            self.parameters.move(self.uphill, 0.0)
        sound = _is_sound(solution)
        if one_sided and not sound:
            self.batch.learn_sides(one_serves=False)
            return unsettled
        if not one_sided:
            self.batch.learn_sides(one_serves=made.balanced and sound)
        return Direction(solution, model.engine, model.fallback)


def elsewhere(
    batch: Batch, parameters: Parameters, only: int | None = None
) -> Iterator[Numbers | None]:
    """Yield the closures' values far from here.

    Args:
        batch: The closures.
        parameters: What the closures depend on. They are left where they were moved.
        only: Which parameter to move. None: every one.
    """
    for step in parameters.elsewhere():
        blocks = enumerate(parameters.blocks(step))
        moved = [
            each if only in (None, place) else torch.zeros_like(each) for place, each in blocks
        ]
        parameters.move(torch.cat(moved), 1.0)
        yield batch.probe()


def _is_sound(solution: Solution) -> bool:
    """Return whether a solve compared its products, and found no sign of wrong ones."""
    bends = solution.ending is not Ending.NON_POSITIVE_CURVATURE
    return solution.products > 1 and bends and not solution.asymmetry > EVEN


def differences_of(
    batch: Batch,
    parameters: Parameters,
    model: LocalModel,
    *,
    preferred: bool = False,
    one_sided: bool = False,
) -> FiniteDifferences:
    """Return what makes products for a model that has none.

    Args:
        batch: The closures.
        parameters: What the closures depend on. Every product displaces them.
        model: The closures near the current parameters.
        preferred: Whether another engine serves where the KL is not smooth.
        one_sided: Whether to look at one side alone.

    Returns:
        The finite differences.
    """
    return FiniteDifferences(
        _slope_of(batch, parameters),
        model.precision,
        preferred=preferred,
        one_sided=one_sided,
        rounding=parameters.rounding,
    )


def _slope_of(batch: Batch, parameters: Parameters) -> Slope:
    def slope(vector: Tensor, length: float) -> tuple[float, Tensor]:
        parameters.move(vector, length)
        return batch.slope()

    return slope
