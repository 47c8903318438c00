"""A test of products by finite differences of the KL's gradient, and of the KL itself."""

from __future__ import annotations

import math
from typing import NamedTuple

from torch import Tensor

from trpo_optim.algorithm.finite_differences import Slope, displaced, resolves
from trpo_optim.long_vectors import dot, norm

__all__ = ["Difference", "disagreement"]

_MOST_LOST = 0.02
"""The share of a displacement that rounding of the parameters may change where it judges others."""


class Difference(NamedTuple):
    """What a product is apart from a finite difference.

    Attributes:
        apart: Relative to the finite difference. 0: nothing, or nothing that can be trusted. NaN:
            the closure gave no number at a point near by.
        measured: The product by finite differences, shape (n,).
    """

    apart: float
    measured: Tensor


def disagreement(
    slope: Slope,
    unit: Tensor,
    image: Tensor,
    precision: float,
    kl_resolution: float,
    max_kl: float | None = None,
    rounding: float = 0.0,
) -> Difference:
    """Return by how much a product differs from the finite difference, beyond what both may err.

    The difference is trusted only where the KL itself, which no derivative enters, curves as much
    along the direction: a policy may well have gradients that are not those of its values, such as
    straight-through ones.

    Args:
        slope: As for ``FiniteDifferences``.
        unit: v, of length 1, shape (n,).
        image: The product Fv in question, shape (n,).
        precision: As for ``FiniteDifferences``.
        kl_resolution: KLs closer than this cannot be told apart, in nats.
        max_kl: The radius, in nats, far inside of which the differences are taken. None or 0: there
            is none.
        rounding: As for ``FiniteDifferences``.

    Returns:
        The difference.
    """
    if not resolves(precision):
        return Difference(0.0, image)
    target = 1e-6 if precision < 1e-10 else 1e-4
    if max_kl:
        target = min(target, max_kl / 10)
    kl, origin = slope(unit, 0.0)
    bend = float(dot(unit, image))
    length = math.sqrt(2 * target / bend) if bend > 1e-6 else math.sqrt(2 * target)
    length, kl_ahead, ahead = displaced(slope, origin, unit, length, target, window=(1 / 10, 10))
    kl_behind, behind = slope(unit, -length)
    central = (ahead - behind).div_(2 * length)
    uneven = ahead.add_(behind).sub_(origin, alpha=2).div_(2 * length)
    size, crooked = float(norm(central)), float(norm(uneven))
    if not math.isfinite(size + crooked):
        return Difference(math.nan, central)
    bend = float(dot(unit, central))
    measured = (kl_ahead + kl_behind - 2 * kl) / length**2
    unresolved = 4 * kl_resolution / length**2
    sound = (
        size > 0
        and rounding <= _MOST_LOST * length
        and crooked <= 0.3 * size
        and bend > 2 * unresolved
        and abs(bend - measured) <= 0.1 * bend + unresolved
    )
    if not sound:
        return Difference(0.0, central)
    apart = float(norm(central - image)) / size
    return Difference(apart if apart > 0.05 + crooked / size else 0.0, central)
