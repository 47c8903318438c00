"""Conjugate gradient for (F + λI) x = b, with a defined answer where F does not curve upwards."""

from __future__ import annotations

import enum
import math
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from trpo_optim.algorithm.krylov_basis import krylov_basis
from trpo_optim.long_vectors import length

__all__ = ["RELATIVE_DAMPING", "Ending", "Solution", "conjugate_gradient"]


class Ending(enum.Enum):
    """Why a solve stopped."""

    CONVERGED = "The relative residual reached the tolerance."
    ITERATION_LIMIT = "The iterations ended before the residual reached the tolerance."
    NON_POSITIVE_CURVATURE = (
        "F + λI is not positive definite, or xᵀFx <= 0; x is the last good iterate."
    )
    NON_FINITE = "A product held NaN or infinity; x is the last finite iterate."


@dataclass(frozen=True)
class Solution:
    """A direction, and the solve behind it; where there was none, its figures are NaN or 0.

    Attributes:
        x: The solution, shape (n,).
        ending: Why the solve stopped.
        iterations: Completed iterations: those that changed x.
        products: Products with F that were made.
        residual: ‖b − (F + λI)x‖ / ‖b‖, from the small system. Only rounding separates it from
            the true residual.
        curvature: xᵀFx, undamped.
        damping: λ.
        asymmetry: The largest |pᵀFq − qᵀFp| of successive vectors p and q of the basis, relative to
            the largest entry of T. 0 for an exact F, up to rounding.
    """

    x: Tensor
    ending: Ending = Ending.CONVERGED
    iterations: int = 0
    products: int = 0
    residual: float = math.nan
    curvature: float = math.nan
    damping: float = math.nan
    asymmetry: float = 0.0


RELATIVE_DAMPING = 0.04
"""λ over the mean of qᵀFq, where λ is left to the solve; chosen in docs/results/step-quality.md."""


def conjugate_gradient(
    product: Callable[[Tensor], Tensor],
    b: Tensor,
    *,
    damping: float | None,
    iterations: int,
    tolerance: float,
) -> Solution:
    """Solve (F + λI) x = b from x = 0.

    This is the Lanczos form of the method: an orthonormal basis q of b, Fb, F²b, … and the small
    tridiagonal matrix T = qᵀFq, from which the iterates of the textbook's recurrences follow. Kept
    orthogonal, the basis lets no rounding grow: in single precision the recurrences raise it by
    four orders of magnitude within ten iterations. The basis does not depend on λ, so that λ can be
    chosen by T; and xᵀFx needs neither another product nor a cancelling difference. One transfer to
    the host per iteration. The basis takes the memory of ``iterations`` vectors, or half of that if
    b is long.

    A good iterate is one along which F itself curves upwards: damping may hide that F does not, and
    a step length follows from xᵀFx alone. The first iterate that is not good ends the solve.

    Args:
        product: v ↦ Fv for vectors of shape (n,), F symmetric; called once per iteration.
        b: The right-hand side, shape (n,), of a length whose square neither under- nor overflows;
            not modified.
        damping: λ ≥ 0. None: ``RELATIVE_DAMPING`` times the mean of qᵀFq over the basis.
        iterations: Most iterations, at least 1.
        tolerance: Stop once ‖b − (F + λI)x‖ ≤ tolerance · ‖b‖.

    Returns:
        The solution and how it ended.

    Source:
        Hestenes & Stiefel (1952); Paige & Saunders, "Solution of sparse indefinite systems of
        linear equations" (1975), for the Lanczos form; Schulman et al. (2015), appendix C.
    """
    basis = krylov_basis(b, min(iterations, length(b)))
    size = basis.rest_length
    small = _Tridiagonal([], [], 0.0)
    best = _Iterate([], 1.0 if math.isfinite(size) else math.nan, damping or 0.0)
    products = 0
    ending = Ending.ITERATION_LIMIT
    if size == 0:
        best, ending = replace(best, residual=0.0), Ending.CONVERGED
    elif not math.isfinite(size):
        ending = Ending.NON_FINITE
    while ending is Ending.ITERATION_LIMIT and products < iterations:
        forth = basis.rest_length if products else 0.0
        bend, back = basis.absorb(product(basis.extend()))
        products += 1
        if not (math.isfinite(bend) and math.isfinite(basis.rest_length)):
            ending = Ending.NON_FINITE
            break
        small = small.extended(bend, basis.rest_length, apart=abs(forth - back))
        iterate = small.solved(damping)
        if iterate is None or not small.bend_along(iterate.y) > 0:
            ending = Ending.NON_POSITIVE_CURVATURE
            break
        best = iterate
        negligible = torch.finfo(b.dtype).eps * abs(bend)
        exhausted = basis.rest_length <= negligible or products == length(b)
        if best.residual <= tolerance or exhausted:
            ending = Ending.CONVERGED
    y = [size * each for each in best.y]
    return Solution(
        x=basis.combined(y),
        ending=ending,
        iterations=len(y),
        products=products,
        residual=best.residual,
        curvature=small.bend_along(y),
        damping=best.damping,
        asymmetry=small.asymmetry,
    )


@dataclass(frozen=True)
class _Iterate:
    """y with (T + λI) y = e₁, the residual ‖b − (F + λI)x‖ / ‖b‖ of x = ‖b‖ qy, and λ."""

    y: list[float]
    residual: float
    damping: float


@dataclass(frozen=True)
class _Tridiagonal:
    """T = qᵀFq, and beneath it the length of what the last product adds to the basis.

    Attributes:
        apart: The largest difference between an entry below the diagonal and the one above it.
    """

    diagonal: list[float]
    below: list[float]
    apart: float

    def extended(self, diagonal: float, below: float, apart: float) -> _Tridiagonal:
        """Return T with another row and column."""
        apart = max(self.apart, apart)
        return _Tridiagonal([*self.diagonal, diagonal], [*self.below, below], apart)

    @property
    def asymmetry(self) -> float:
        """How far T is from its transpose, relative to its largest entry."""
        largest = max(map(abs, [*self.diagonal, *self.below]), default=0.0)
        return self.apart / largest if self.apart else 0.0

    def solved(self, damping: float | None) -> _Iterate | None:
        """Solve by LDLᵀ; None where T + λI is not positive definite."""
        if damping is None:
            damping = RELATIVE_DAMPING * math.fsum(self.diagonal) / len(self.diagonal)
        pivots: list[float] = []
        z: list[float] = []
        for index, entry in enumerate(self.diagonal):
            above = self.below[index - 1] if index else 0.0
            factor = above / pivots[-1] if index else 0.0
            pivots.append(entry + damping - factor * above)
            z.append(-factor * z[-1] if index else 1.0)
            if not pivots[-1] > 0:
                return None
        y: list[float] = []
        for index in reversed(range(len(z))):
            after = self.below[index] / pivots[index] * y[-1] if y else 0.0
            y.append(z[index] / pivots[index] - after)
        return _Iterate(y[::-1], self.below[-1] * abs(y[0]), damping)

    def bend_along(self, y: list[float]) -> float:
        """Return yᵀTy for the leading block of y's size."""
        size = len(y)
        own = math.fsum(t * each * each for t, each in zip(self.diagonal, y, strict=False))
        cross = math.fsum(self.below[i] * y[i] * y[i + 1] for i in range(size - 1))
        return own + 2 * cross
