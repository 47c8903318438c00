"""Fisher-vector products from first derivatives alone, and a test of others by them.

Where the old policy is the new one, the KL's gradient is zero. So Fv = (∇KL(θ + εv) − ∇KL(θ)) / ε
to first order in ε, for the price of one gradient.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from trpo_optim.errors import TrustRegionError

__all__ = ["FiniteDifferences", "Slope", "disagreement"]

_COARSEST = 1e-5
"""The unit of rounding above which gradients are too coarse to be subtracted."""

_EVEN = 0.05
"""By how much the differences on both sides may be apart, relative to their sum."""

_MOST_TRIES = 6
"""How often a displacement is changed until the KL that it makes is the wanted one."""


Slope = Callable[[Tensor, float], tuple[float, Tensor]]
"""From a direction and a length to the KL that far from the current parameters, in nats, and its
gradient there, shape (n,)."""


class FiniteDifferences:
    """v ↦ Fv by forward differences of the KL's gradient.

    The displacement is chosen by the KL that it makes: large against what rounding adds to the
    gradient, and small against where the KL stops to be quadratic. In single precision that KL is
    1e-8 nats, and products are then within 2e-3 of the exact ones for smooth policies. In double
    precision it is 1e-15 nats, or 1e-12 where part of the policy computes in single precision.

    Args:
        slope: The KL and its gradient at displaced parameters.
        precision: The unit of rounding of the coarsest parameter and of the KL.

    Raises:
        TrustRegionError: If that is half precision.
    """

    def __init__(self, slope: Slope, precision: float) -> None:
        if precision > _COARSEST:
            raise TrustRegionError(_TOO_COARSE)
        self._slope = slope
        self._targets = (1e-15, 1e-12) if precision < 1e-10 else (1e-8, 1e-6)
        self._target = self._length = math.nan  # until the first product
        self._origin: Tensor | None = None

    def product(self, direction: Tensor) -> Tensor:
        """Return Fv.

        The first product is by central differences, which show whether the KL is smooth here.

        Args:
            direction: v, shape (n,).

        Returns:
            Fv, shape (n,).

        Raises:
            TrustRegionError: If the differences on both sides do not agree.
        """
        norm = float(direction.norm())
        if norm == 0:
            return torch.zeros_like(direction)
        unit = direction / norm
        if self._origin is None:
            return self._first(unit).mul_(norm)
        self._length, _, there = _displaced(
            self._slope, self._origin, unit, self._length, self._target, window=(1 / 300, 10)
        )
        return (there - self._origin).mul_(norm / self._length)

    def _first(self, unit: Tensor) -> Tensor:
        """Return a product by central differences, with whose displacement the others begin."""
        _, self._origin = self._slope(unit, 0.0)
        best, product = math.inf, torch.zeros_like(unit)
        self._target, self._length = self._targets[-1], math.sqrt(2 * self._targets[-1])
        for target in self._targets:
            length, _, there = _displaced(
                self._slope,
                self._origin,
                unit,
                math.sqrt(2 * target),
                target,
                window=(1 / 3, 3),
            )
            if 0.5 * length * float(unit @ (there - self._origin)) < 1e-3 * target:
                continue  # the KL is flat however far one goes
            ahead, behind = there - self._origin, self._origin - self._slope(unit, -length)[1]
            size, apart = float((ahead + behind).norm()), float((ahead - behind).norm())
            uneven = apart / max(size, 1e-300) if apart else 0.0
            if not uneven >= best:
                best, self._target, self._length = uneven, target, length
                product = (ahead + behind) / (2 * length)
            if not uneven > _EVEN:
                break
        if 0.5 < best < math.inf:
            raise TrustRegionError(_TOO_COARSE)
        return product


_TOO_COARSE = (
    "The closure cannot be differentiated twice, and finite differences of the KL's gradient do "
    "not resolve its curvature: the policy computes in half precision, or the KL has a kink here. "
    "Evaluate the policy in float32 (without autocast), or use mode='vanilla', which needs first "
    "derivatives only."
)


def disagreement(
    slope: Slope,
    unit: Tensor,
    image: Tensor,
    precision: float,
    kl_resolution: float,
    max_kl: float | None = None,
) -> float:
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
        max_kl: The radius, in nats, far inside of which the differences are taken; None: there is
            none.

    Returns:
        The difference, relative to the product by finite differences. 0: there is none, or none
        that can be trusted. NaN: the closure gave no number at a point near by.
    """
    if precision > _COARSEST:
        return 0.0
    target = 1e-6 if precision < 1e-10 else 1e-4
    if max_kl is not None:
        target = min(target, max_kl / 10)
    kl, origin = slope(unit, 0.0)
    bend = float(unit @ image)
    length = math.sqrt(2 * target / bend) if bend > 1e-6 else math.sqrt(2 * target)
    length, kl_ahead, ahead = _displaced(slope, origin, unit, length, target, window=(1 / 10, 10))
    kl_behind, behind = slope(unit, -length)
    central = (ahead - behind).div_(2 * length)
    uneven = ahead.add_(behind).sub_(origin, alpha=2).div_(2 * length)
    size, crooked = float(central.norm()), float(uneven.norm())
    if not math.isfinite(size + crooked):
        return math.nan
    bend = float(unit @ central)
    measured = (kl_ahead + kl_behind - 2 * kl) / length**2
    rounding = 4 * kl_resolution / length**2
    sound = (
        size > 0
        and crooked <= 0.3 * size
        and bend > 2 * rounding
        and abs(bend - measured) <= 0.1 * bend + rounding
    )
    if not sound:
        return 0.0
    difference = float((central - image).norm()) / size
    return difference if difference > 0.05 + crooked / size else 0.0


def _displaced(
    slope: Slope,
    origin: Tensor,
    unit: Tensor,
    length: float,
    target: float,
    *,
    window: tuple[float, float],
) -> tuple[float, float, Tensor]:
    """Return a displacement that makes about the wanted KL, and the KL and its slope there.

    The KL is taken from the slope, ½ε vᵀ∇KL, which resolves it better than the KL's own value.
    """
    longest = 1e4 * math.sqrt(2 * target)
    for tries in range(_MOST_TRIES):
        kl, there = slope(unit, length)
        made = 0.5 * length * float(unit @ (there - origin))
        factor = 10.0 if not made > 0 else min(max(math.sqrt(target / made), 1e-3), 1e2)
        fits = window[0] * target <= made <= window[1] * target
        flat = length == longest and factor > 1
        if fits or flat or not math.isfinite(made) or tries == _MOST_TRIES - 1:
            break
        length = min(factor * length, longest)
    return length, kl, there
