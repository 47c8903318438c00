"""Observations, actions and recurrent states: single values, or dicts, tuples and lists of them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

__all__ = ["mapped"]


def mapped(change: Callable[..., Any], *values: Any) -> Any:
    """Apply a function to every part of nested values.

    Args:
        change: Takes one part of each value, in the order of ``values``. A part is anything that
            is not a mapping, a tuple or a list: a tensor, an array, a distribution.
        values: One or more values with the same nesting.

    Returns:
        The results, nested like the first value. A mapping becomes a dict. Named tuples, tuples
        and lists keep their type.
    """
    first = values[0]
    if isinstance(first, Mapping):
        return {name: mapped(change, *(value[name] for value in values)) for name in first}
    if not isinstance(first, tuple | list):
        return change(*values)
    parts = [mapped(change, *each) for each in zip(*values, strict=True)]
    if isinstance(first, list):
        return parts
    return type(first)._make(parts) if hasattr(first, "_make") else tuple(parts)
