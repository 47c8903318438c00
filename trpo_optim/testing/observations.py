"""Observations, actions and their parts: tensors, or tuples and dicts of them, the batch first."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from torch import Tensor

from trpo_optim.distributions.nesting import mapped
from trpo_optim.errors import TrustRegionError

__all__ = ["parts", "require_observations", "select"]


def parts(value: Any, key: str = "") -> Iterator[tuple[str, Any]]:
    """Yield what observations are made of, and where it is in them."""
    if not isinstance(value, Mapping | tuple | list):
        yield key, value
        return
    for name, part in value.items() if isinstance(value, Mapping) else enumerate(value):
        yield from parts(part, f"{key}[{name!r}]")


def select(value: Any, rows: Tensor) -> Any:
    """Return some rows of observations or actions."""
    return mapped(lambda each: each[rows.to(each.device)], value)


def require_observations(value: Any) -> int:
    """Check that observations are tensors of one batch, of two rows or more.

    Args:
        value: What was passed for them.

    Returns:
        The size of the batch.

    Raises:
        TrustRegionError: If they are anything else.
    """
    sizes = set()
    for _, each in parts(value):
        if not isinstance(each, Tensor):
            raise TrustRegionError(
                f"The observations hold a {type(each).__name__}. Pass a tensor, or a tuple or dict "
                "of tensors (torch.as_tensor), the batch first."
            )
        sizes.add(len(each) if each.dim() else 0)
    if len(sizes) != 1 or min(sizes) < 2:
        raise TrustRegionError(
            f"The observations have {sorted(sizes) or 'no'} rows; all parts must have the "
            "same number, at least 2, the batch first."
        )
    return sizes.pop()
