"""Checks of numbers that a caller, a policy or a critic gives."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

from trpo_optim.errors import TrustRegionError
from trpo_optim.rollouts.spaces import evaluated

__all__ = ["require_one_a_row", "require_shares", "values_by"]


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


def require_one_a_row(log_prob: Tensor, count: int) -> None:
    """Check that a policy gives one log-probability per row.

    Args:
        log_prob: What it gives.
        count: How many rows there are.

    Raises:
        TrustRegionError: If the shape is another.
    """
    if log_prob.shape != (count,):
        raise TrustRegionError(
            f"The policy's log-probabilities have shape {tuple(log_prob.shape)} and there are "
            f"{count} rows. If the last dimension is the action's, return Independent(dist, 1) "
            "from the policy."
        )


def values_by(critic: Callable[[Any], Tensor], observations: Any, count: int) -> Tensor:
    """Return a critic's values, (B,), of B observations.

    Args:
        critic: From observations (B, …) to values, (B,) or (B, 1).
        observations: The observations.
        count: B.

    Raises:
        TrustRegionError: If the values have another shape.
    """
    values: Tensor = evaluated(critic, observations, info={})
    if values.numel() != count or values.shape[:1] not in ((), (count,)):
        raise TrustRegionError(
            f"The critic returned values of shape {tuple(values.shape)} for {count} observations; "
            f"it must be ({count},) or ({count}, 1), one value per observation."
        )
    return values.reshape(count)
