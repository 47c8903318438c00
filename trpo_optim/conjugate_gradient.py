"""Conjugate gradient for (F + λI) x = b, with a defined answer where F does not curve upwards."""

from __future__ import annotations

import enum
import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = ["Ending", "Solution", "conjugate_gradient"]


class Ending(enum.Enum):
    """Why a solve stopped."""

    CONVERGED = "The relative residual reached the tolerance."
    ITERATION_LIMIT = "The iterations ran out before the residual reached the tolerance."
    NON_POSITIVE_CURVATURE = "A search direction had pᵀ(F + λI)p <= 0; x is the last good iterate."
    NON_FINITE = "A product held NaN or infinity; x is the last finite iterate."


@dataclass(frozen=True)
class Solution:
    """A solve's result.

    Attributes:
        x: The solution, shape (n,).
        ending: Why the solve stopped.
        iterations: Completed iterations: those that changed x.
        products: Products with F that were made.
        residual: ‖b − (F + λI)x‖ / ‖b‖.
        curvature: xᵀFx, undamped.
    """

    x: Tensor
    ending: Ending
    iterations: int
    products: int
    residual: float
    curvature: float


def conjugate_gradient(
    product: Callable[[Tensor], Tensor],
    b: Tensor,
    *,
    damping: float,
    iterations: int,
    tolerance: float,
) -> Solution:
    """Solve (F + λI) x = b from x = 0.

    Differs from the textbook in three ways. Residuals are kept, and each new one is made orthogonal
    to them all: in single precision they else lose that within a few iterations, and rounding grows
    by four orders of magnitude on its way into x. Fx is carried along with x, so that xᵀFx comes
    without another product and without the cancellation of xᵀ(F + λI)x − λ‖x‖². And an update that
    the curvature or its finiteness forbids is thrown away. One transfer to the host per iteration.

    Args:
        product: v ↦ Fv for vectors of shape (n,), F symmetric; called once per iteration.
        b: The right-hand side, shape (n,), of a length whose square neither under- nor overflows;
            not modified.
        damping: λ ≥ 0.
        iterations: Most iterations, at least 1.
        tolerance: Stop once ‖b − (F + λI)x‖ ≤ tolerance · ‖b‖.

    Returns:
        The solution and how it ended.

    Source:
        Hestenes & Stiefel (1952); Schulman et al. (2015), appendix C; Golub & Van Loan, "Matrix
        Computations" (2013), section 10.3, for reorthogonalisation.
    """
    x, fx = torch.zeros_like(b), torch.zeros_like(b)
    residual = direction = b
    squared = b.dot(b)
    initial = current = float(squared)
    basis = b.new_empty(min(iterations, len(b)), len(b))  # the residuals so far, at unit length
    done = products = 0
    ending = Ending.ITERATION_LIMIT if current != 0 else Ending.CONVERGED
    while ending is Ending.ITERATION_LIMIT and done < iterations:
        f_direction = product(direction)
        products += 1
        damped = f_direction.add(direction, alpha=damping)
        curvature = direction.dot(damped)
        alpha = squared / curvature
        if done < len(basis):
            torch.mul(residual, squared.rsqrt(), out=basis[done])
        next_residual = residual.addcmul(damped, alpha, value=-1)
        earlier = basis[: done + 1]
        next_residual -= earlier.T @ (earlier @ next_residual)
        next_squared = next_residual.dot(next_residual)
        bend, following = torch.stack([curvature, next_squared]).tolist()
        if not math.isfinite(bend):
            ending = Ending.NON_FINITE
        elif bend <= 0:
            ending = Ending.NON_POSITIVE_CURVATURE
        elif not math.isfinite(following):
            ending = Ending.NON_FINITE
        else:
            x, fx = x.addcmul(direction, alpha), fx.addcmul(f_direction, alpha)
            direction = next_residual.addcmul(direction, next_squared / squared)
            residual, squared, current = next_residual, next_squared, following
            done += 1
            if math.sqrt(current) <= tolerance * math.sqrt(initial):
                ending = Ending.CONVERGED
    return Solution(
        x=x,
        ending=ending,
        iterations=done,
        products=products,
        residual=math.sqrt(current / initial) if initial else 0.0,
        curvature=float(x.dot(fx)),
    )
