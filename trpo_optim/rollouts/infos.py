"""What environments say beside their observations, such as which actions are legal."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from trpo_optim.distributions.nesting import mapped
from trpo_optim.errors import TrustRegionError
from trpo_optim.rollouts.spaces import array_of, one_of, stacked

__all__ = ["entries_of", "entry_of", "names_of", "updated"]

_Array = np.ndarray[Any, Any]


def names_of(info: str | Sequence[str]) -> tuple[str, ...]:
    """Return the names of the entries that a caller asks for, one or several."""
    return (info,) if isinstance(info, str) else tuple(info)


def entry_of(info: Any, name: str, index: int) -> Any:
    """Return a copy of one environment's entry, or None where it has none.

    Args:
        info: Of vector environments: a dict of arrays, or a list of dicts as ``DictInfoToList``
            returns it.
        name: The entry's.
        index: The environment's.

    Returns:
        Arrays, or dicts and tuples of them.
    """
    if not isinstance(info, Mapping):
        value = info[index].get(name)
        return None if value is None else _arrays(value)
    values, known = info.get(name), info.get(f"_{name}")
    if values is None or not (known is None or known[index]):
        return None
    if isinstance(values, Mapping):  # beside each entry is which environments have it
        parts = {
            part: entry_of(values, part, index)
            for part in values
            if not (part.startswith("_") and part[1:] in values)
        }
        return None if any(each is None for each in parts.values()) else parts
    if isinstance(values, np.ndarray) and values.dtype == object:
        return None if values[index] is None else _arrays(values[index])
    return one_of(values, index)


def _arrays(value: Any) -> Any:
    """Return an entry in arrays. A list is one array: to a policy it would be many entries."""
    if isinstance(value, Mapping):
        return {name: _arrays(each) for name, each in value.items()}
    return np.array(value) if isinstance(value, list) else mapped(array_of, value)


def entries_of(
    info: Any, names: Iterable[str], index: int, like: Mapping[str, Any] | None = None
) -> dict[str, Any]:
    """Return one environment's entries.

    Args:
        info: As ``entry_of`` takes it.
        names: Of the entries.
        index: The environment's.
        like: Entries that these must have the shapes of. None: any shapes.

    Returns:
        Copies, by name.

    Raises:
        TrustRegionError: If an entry is missing, is no number, or has another shape.
    """
    found = {name: entry_of(info, name, index) for name in names}
    for name, entry in found.items():
        if entry is None:
            has = info if isinstance(info, Mapping) else info[index]
            there = [
                key
                for key in has
                if not key.startswith("_") and entry_of(info, key, index) is not None
            ]
            raise TrustRegionError(
                f"The info of environment {index} has no {name!r}; it has {there}. Every reset() "
                "and every step() must return what info= names. Correct the name, or add the "
                "entry in a wrapper."
            )
        form = mapped(_form, entry)
        expected = form if like is None else mapped(_form, like[name])
        if form != expected:
            raise TrustRegionError(
                f"info[{name!r}] has shape {form}, and had {expected} before. Give it one shape: "
                "for example a mask over all actions, not a list of the legal ones."
            )
    return found


def _form(entry: _Array) -> tuple[int, ...]:
    """Return the shape of an entry, which holds numbers."""
    if entry.dtype.kind not in "biufc":
        raise TrustRegionError(
            f"info= names an entry that holds {entry!r}. Only numbers and bools reach a policy. "
            "Name another, or encode it in a wrapper."
        )
    return tuple(map(int, entry.shape))


def updated(
    names: Iterable[str], before: Mapping[str, Any] | None, info: Any, rows: _Array
) -> dict[str, Any]:
    """Return the entries of all environments after some of them have said new ones.

    Args:
        names: Of the entries.
        before: What they were, (N, …) by name; None where all environments say new ones.
        info: As ``entry_of`` takes it.
        rows: Which environments say new ones, (N,).

    Returns:
        By name, (N, …).
    """
    like = None if before is None else one_of(before, 0)
    entries = []
    for index, new in enumerate(rows):
        own = entries_of(info, names, index, like) if new else one_of(before, index)
        like = own if like is None else like
        entries.append(own)
    result: dict[str, Any] = stacked(entries)
    return result
