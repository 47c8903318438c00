"""Coordinates for the solve in which all parameters have gradients of about one size."""

from __future__ import annotations

import math

from torch import Tensor

from trpo_optim.long_vectors import length

__all__ = ["FLOOR", "DiagonalPreconditioner"]

FLOOR = 0.1
"""What D adds to the root, in units in which the gradient's mean square is 1."""


class DiagonalPreconditioner:
    """D = 0.1 + the root of the running mean of squared gradients: the solve is (F + λD) x = g.

    In the coordinates D^½x, conjugate gradient has the same radius and the same line search. It
    needs fewer products if parameters live on different scales, as embeddings, attention and norms
    do.

    Every gradient counts by its direction alone, so that the scale of the loss does not matter: its
    mean square over all parameters is 1. The first gradient begins the mean.

    Args:
        roots: The root of the mean square before this step, shape (n,). NaN where a parameter has
            none yet.
        decay: The share of the mean that a step keeps, in [0, 1).

    Attributes:
        roots: The root of the mean square with this step's gradient. Before ``scale`` is called,
            the given root.

    Source:
        Martens, "Deep learning via Hessian-free optimization" (2010), section 4.7, for a diagonal
        preconditioner from squared gradients; Kingma & Ba, "Adam" (2015), for the running mean.
    """

    def __init__(self, roots: Tensor, decay: float) -> None:
        self.roots = self._before = roots
        self._decay = decay

    def scale(self, unit: Tensor) -> Tensor:
        """Return D^−½, shape (n,).

        Args:
            unit: The gradient's unit vector, shape (n,).
        """
        present = unit.abs().mul_(math.sqrt(length(unit)))
        mean = self._before.square().lerp_(present.square(), 1 - self._decay)
        self.roots = mean.sqrt_().where(self._before.isfinite(), present)
        return (self.roots + FLOOR).rsqrt_()
