"""Observations and actions: tensors, tuples and dicts of them, or objects that hold tensors."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from torch import Tensor, nn

from trpo_optim.distributions.nesting import mapped
from trpo_optim.errors import TrustRegionError

__all__ = ["are_rows", "changed", "parts", "require_observations", "select", "tensors_of"]


def parts(value: Any, key: str = "") -> Iterator[tuple[str, Any]]:
    """Yield what observations are made of, and where it is in them."""
    if not isinstance(value, Mapping | tuple | list):
        yield key, value
        return
    for name, part in value.items() if isinstance(value, Mapping) else enumerate(value):
        yield from parts(part, f"{key}[{name!r}]")


def tensors_of(value: Any, key: str = "") -> Iterator[tuple[str, Tensor]]:
    """Yield the tensors of observations, also those that objects hold, and where they are."""
    stack, seen = [(key, value)], dict[int, Any]()
    while stack:
        place, each = stack.pop()
        if id(each) in seen:
            continue
        seen[id(each)] = each
        if isinstance(each, Tensor):
            yield place, each
        elif isinstance(each, Mapping | tuple | list):
            named = each.items() if isinstance(each, Mapping) else enumerate(each)
            stack.extend((f"{place}[{name!r}]", part) for name, part in named)
        elif not isinstance(each, type | nn.Module):
            stack.extend((f"{place}.{name}", part) for name, part in _attributes(each).items())


def _attributes(value: Any) -> dict[str, Any]:
    slots = (name for kind in type(value).__mro__ for name in getattr(kind, "__slots__", ()))
    found = {name: getattr(value, name) for name in slots if hasattr(value, name)}
    return {**found, **getattr(value, "__dict__", {})}


def changed(change: Callable[[Tensor], Tensor], value: Any) -> Any:
    """Return a copy of observations or actions, every tensor in it changed.

    Args:
        change: From a tensor to the one in its place.
        value: Tensors, tuples and dicts of them, or objects that hold tensors: these are copied by
            ``copy.deepcopy``.
    """
    return mapped(lambda part: _changed(change, part), value)


def _changed(change: Callable[[Tensor], Tensor], part: Any) -> Any:
    if isinstance(part, Tensor):
        return change(part)
    return copy.deepcopy(part, {id(each): change(each) for _, each in tensors_of(part)})


def are_rows(value: Any) -> bool:
    """Return whether observations are tensors alone, which can be cut into rows."""
    return all(isinstance(each, Tensor) for _, each in parts(value))


def select(value: Any, rows: Tensor) -> Any:
    """Return some rows of observations or actions."""
    return mapped(lambda each: each[rows.to(each.device)], value)


def require_observations(value: Any) -> int | None:
    """Check that observations hold tensors, and if they are tensors alone, of one batch.

    Args:
        value: What was passed for them.

    Returns:
        The size of the batch, 2 or more; None where objects hold them, such as a graph's nodes.

    Raises:
        TrustRegionError: If they are anything else.
    """
    sizes = set()
    for place, each in parts(value):
        if isinstance(each, Tensor):
            sizes.add(len(each) if each.dim() else 0)
        elif next(tensors_of(each), None) is None:
            raise TrustRegionError(
                f"The observations{place} hold a {type(each).__name__}. Pass a tensor, a tuple or "
                "dict of tensors (torch.as_tensor), the batch first, or an object that holds "
                "tensors."
            )
    if not are_rows(value):
        return None
    if len(sizes) != 1 or min(sizes) < 2:
        raise TrustRegionError(
            f"The observations have {sorted(sizes) or 'no'} rows; all parts must have the "
            "same number, at least 2, the batch first."
        )
    return sizes.pop()
