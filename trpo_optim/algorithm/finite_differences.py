"""Fisher-vector products from first derivatives alone.

Where the old policy is the new one, the KL's gradient is zero. So Fv = (∇KL(θ + εv) − ∇KL(θ)) / ε
to first order in ε, for the price of one gradient.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from trpo_optim.errors import TrustRegionError
from trpo_optim.long_vectors import dot, norm

__all__ = [
    "EVEN",
    "FiniteDifferences",
    "Slope",
    "UnresolvedError",
    "displaced",
    "resolves",
]

_COARSEST = 1e-5
"""The unit of rounding above which gradients are too coarse to be subtracted."""

EVEN, _MOST_UNEVEN = 0.05, 0.5
"""By how much the differences on both sides may be apart, relative to their sum: in a policy that
is smooth here, and at most."""

_BALANCED = 0.01
"""How uneven the slopes on both sides may be for the gradient between them to count as zero."""

_FLAT = 1e-3
"""The share of the wanted KL below which a displacement makes none."""

_MOST_LOST = 0.05
"""The share of a displacement that rounding of the parameters may change."""

_LARGEST = 1e-4
"""The KL, in nats, beyond which a displacement that rounding makes long does not serve."""

_MOST_TRIES = 6
"""How often a displacement is changed until the KL that it makes is the wanted one."""


Slope = Callable[[Tensor, float], tuple[float, Tensor]]
"""From a direction and a length to the KL that far from the current parameters, in nats, and its
gradient there, shape (n,)."""


class UnresolvedError(TrustRegionError):
    """Finite differences do not resolve the curvature."""


class FiniteDifferences:
    """v ↦ Fv by forward differences of the KL's gradient.

    The displacement is chosen by the KL that it makes: large against what rounding adds to the
    gradient, and small against where the KL stops to be quadratic. In single precision that KL is
    3e-8 nats, and products are then within 2e-3 of the exact ones for smooth policies. One side
    takes 3e-9 nats, since nothing cancels the terms of third order in its first product. Its
    products have more noise if a Gaussian is narrow: with a standard deviation of e⁻³, the step
    gains 0.3 % less, with e⁻⁵ 1.6 % less. In double precision the KL is 1e-15 nats, or 1e-12 where
    part of the policy computes in single precision.

    Args:
        slope: The KL and its gradient at displaced parameters.
        precision: The unit of rounding of the coarsest parameter and of the KL.
        preferred: Whether another engine serves where the KL is not smooth. The differences on both
            sides must then be about the same.
        one_sided: Whether to look at one side alone. The first product then costs as much as any
            other. The caller must check that the products are symmetric.
        rounding: The length of what rounding of the parameters adds to a displacement.

    Attributes:
        balanced: True if both sides agreed. Later steps may then use one side.

    Raises:
        UnresolvedError: If that is half precision.
    """

    def __init__(
        self,
        slope: Slope,
        precision: float,
        *,
        preferred: bool = False,
        one_sided: bool = False,
        rounding: float = 0.0,
    ) -> None:
        if not resolves(precision):
            raise UnresolvedError(_TOO_COARSE)
        self._slope = slope
        self._most_uneven = EVEN if preferred else _MOST_UNEVEN
        self._one_sided = one_sided
        self._shortest = rounding / _MOST_LOST
        self.balanced = False
        precise = precision < 1e-10
        self._targets = (1e-15, 1e-12) if precise else (3e-9 if one_sided else 3e-8, 1e-6)
        self._target = self._length = math.nan  # until the first product
        self._origin: Tensor | None = None

    def product(self, direction: Tensor) -> Tensor:
        """Return Fv.

        The first product is by central differences, unless one side serves. They show whether the
        KL is smooth here, and whether its gradient is zero. If it is not, it is evaluated and taken
        off. The mean of both sides does not serve as that gradient: in a network with kinks, it put
        the products with little curvature off by 15 %.

        Args:
            direction: v, shape (n,).

        Returns:
            Fv, shape (n,).

        Raises:
            UnresolvedError: If the differences on both sides do not agree, or the KL of the only
                side is flat.
        """
        length = float(norm(direction))
        if length == 0:
            return torch.zeros_like(direction)
        unit = direction / length
        if self._origin is None:
            first = self._first_of_one_side if self._one_sided else self._first
            return first(unit).mul_(length)
        self._length, there = self._ahead(unit, self._target, (1 / 300, 10), self._length)
        return (there - self._origin).mul_(length / self._length)

    def _first_of_one_side(self, unit: Tensor) -> Tensor:
        """Return a product with whose displacement the others begin."""
        self._target, self._origin = self._targets[0], torch.zeros_like(unit)
        length, there = self._ahead(unit, self._target, (1 / 10, 30))
        made = 0.5 * length * float(dot(unit, there))
        if made < _FLAT * self._target:
            raise UnresolvedError(_TOO_COARSE)
        self._length = max(length * math.sqrt(self._target / made), self._shortest)
        return there.div_(length)

    def _first(self, unit: Tensor) -> Tensor:
        """Return a product by central differences, with whose displacement the others begin."""
        best, product = math.inf, torch.zeros_like(unit)
        self._target, self._length = self._targets[-1], math.sqrt(2 * self._targets[-1])
        self._origin = torch.zeros_like(unit)
        known = False
        for target in self._targets:
            length, ahead = self._ahead(unit, target, (1 / 3, 30))
            _, behind = self._slope(unit, -length)
            if not known and _unevenness(ahead, behind, self._origin) > _BALANCED:
                known = True  # a kink, or a gradient that is not zero here
                _, self._origin = self._slope(unit, 0.0)
                length, ahead = self._ahead(unit, target, (1 / 3, 30))
                _, behind = self._slope(unit, -length)
            origin = self._origin
            made = 0.5 * length * float(dot(unit, ahead - origin))
            if made < _FLAT * target:
                continue  # the KL is flat however far one goes
            uneven = _unevenness(ahead, behind, origin)
            if not uneven >= best:
                best, self._target = uneven, target
                self._length = max(length * math.sqrt(target / made), self._shortest)
                product = (ahead - behind) / (2 * length)
            if not uneven > EVEN:
                self.balanced = target == self._targets[0] and not known
                break
        if self._most_uneven < best < math.inf:
            raise UnresolvedError(_TOO_COARSE)
        return product

    def _ahead(
        self, unit: Tensor, target: float, window: tuple[float, float], length: float | None = None
    ) -> tuple[float, Tensor]:
        """Return a displacement that makes about the wanted KL, and the slope there."""
        assert self._origin is not None  # the caller has set it
        first = math.sqrt(2 * target) if length is None else length
        length, _, ahead = displaced(
            self._slope,
            self._origin,
            unit,
            first,
            target,
            window=window,
            shortest=self._shortest,
        )
        if length == self._shortest:
            made = 0.5 * length * float(dot(unit, ahead - self._origin))
            if made > max(_LARGEST, window[1] * target):
                raise UnresolvedError(_TOO_COARSE)
        return length, ahead


def _unevenness(ahead: Tensor, behind: Tensor, origin: Tensor) -> float:
    """Return how far two one-sided differences are apart, relative to their sum."""
    apart = float(norm(ahead + behind - 2 * origin))
    return apart / max(float(norm(ahead - behind)), 1e-300) if apart else 0.0


def resolves(precision: float) -> bool:
    """Return whether gradients of a precision can be subtracted.

    Args:
        precision: The unit of rounding of the coarsest parameter and of the KL.
    """
    return precision <= _COARSEST


_TOO_COARSE = (
    "Finite differences of the KL's gradient do not resolve its curvature: the policy computes in "
    "half precision, its parameters are large beside the moves that matter, or the KL has a kink "
    "here. If engine is 'finite differences', set "
    "engine='auto'. If it is 'auto', torch cannot differentiate the closure twice: evaluate the "
    "policy in float32 (without autocast), or use mode='vanilla', which needs first derivatives "
    "only."
)


def displaced(
    slope: Slope,
    origin: Tensor,
    unit: Tensor,
    length: float,
    target: float,
    *,
    window: tuple[float, float],
    shortest: float = 0.0,
) -> tuple[float, float, Tensor]:
    """Return a displacement that makes about the wanted KL, and the KL and its slope there.

    The KL is taken from the slope, ½ε vᵀ∇KL, which resolves it better than the KL's own value.
    """
    longest = max(1e4 * math.sqrt(2 * target), shortest)
    length = max(length, shortest)
    for tries in range(_MOST_TRIES):
        kl, there = slope(unit, length)
        made = 0.5 * length * float(dot(unit, there - origin))
        factor = 10.0 if not made > 0 else min(max(math.sqrt(target / made), 1e-3), 1e2)
        fits = window[0] * target <= made <= window[1] * target
        ends = (length == longest and factor > 1) or (length == shortest and factor < 1)
        if fits or ends or not math.isfinite(made) or tries == _MOST_TRIES - 1:
            break
        length = max(min(factor * length, longest), shortest)
    return length, kl, there
