"""Checks of the numbers that are given beside log-probabilities."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from trpo_optim.errors import TrustRegionError

__all__ = ["require_beside", "require_no_graph"]


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


def require_no_graph(name: str, value: Tensor) -> None:
    """Check that an argument was computed without a graph."""
    if value.requires_grad:
        raise TrustRegionError(f"{name} requires grad. Compute it under no_grad before.")
