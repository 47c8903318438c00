"""Checks of counts, and of the numbers that are given beside log-probabilities."""

from __future__ import annotations

from collections.abc import Mapping
from numbers import Integral
from typing import Any

from torch import Tensor

from trpo_optim.errors import TrustRegionError

__all__ = ["is_count", "require_beside", "require_counts", "require_no_graph", "require_tensor"]


def is_count(value: object, least: int = 1) -> bool:
    """Return whether a value is a whole number, Python's or NumPy's, and large enough."""
    return isinstance(value, Integral) and not isinstance(value, bool) and int(value) >= least


def require_counts(**values: int | None) -> None:
    """Check that numbers are whole and at least 1.

    Args:
        values: The numbers by name; None where one is not given.

    Raises:
        TrustRegionError: If one is not; it is named.
    """
    for name, value in values.items():
        if value is not None and not is_count(value):
            raise TrustRegionError(f"{name} is {value!r}; it must be a whole number of at least 1.")


def require_beside(
    log_prob: Tensor, given: Mapping[str, Tensor], *, called: str, unit: str
) -> None:
    """Check that there is one number, without a graph, for every log-probability.

    Args:
        log_prob: Of the new policy.
        given: The other numbers, by the names of their arguments.
        called: What messages call ``log_prob``.
        unit: What each number is of, for messages.

    Raises:
        TrustRegionError: If a shape differs, or a number requires grad.
    """
    for name, value in given.items():
        if value.shape != log_prob.shape:
            raise TrustRegionError(
                f"{name} has shape {tuple(value.shape)} and the {called} "
                f"{tuple(log_prob.shape)}. Pass one number per {unit} in both."
            )
        require_no_graph(name, value)


def require_tensor(name: str, value: Any) -> None:
    """Check that an argument is a tensor, and no array or list."""
    if not isinstance(value, Tensor):
        raise TrustRegionError(
            f"{name} is a {type(value).__name__}; it must be a tensor. Pass "
            f"torch.as_tensor({name})."
        )


def require_no_graph(name: str, value: Tensor) -> None:
    """Check that an argument was computed without a graph."""
    if value.requires_grad:
        raise TrustRegionError(f"{name} requires grad. Compute it under no_grad before.")
