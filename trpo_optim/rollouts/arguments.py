"""Checks of numbers that a caller gives."""

from __future__ import annotations

from numbers import Integral

from trpo_optim.errors import TrustRegionError

__all__ = ["require_counts", "require_shares"]


def require_shares(**values: float) -> None:
    """Check that numbers lie in [0, 1].

    Args:
        values: The numbers by name.

    Raises:
        TrustRegionError: If one does not; it is named.
    """
    for name, value in values.items():
        if not 0 <= value <= 1:
            raise TrustRegionError(f"{name} is {value!r}; it must be in [0, 1].")


def require_counts(**values: int | None) -> None:
    """Check that numbers are whole and at least 1.

    Args:
        values: The numbers by name; None where one is not given.

    Raises:
        TrustRegionError: If one is not; it is named.
    """
    for name, value in values.items():
        if value is not None and (not isinstance(value, Integral) or value < 1):
            raise TrustRegionError(f"{name} is {value!r}; it must be a whole number of at least 1.")
