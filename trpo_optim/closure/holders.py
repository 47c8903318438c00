"""Where the parameters live: the modules and objects behind a closure that hold one of them."""

from __future__ import annotations

import contextlib
import functools
import types
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence, Set
from typing import Any

import torch
from torch import Tensor, nn

__all__ = ["LONGEST", "attributes", "is_plain_object", "reached"]

LONGEST = 1000
"""Lists and dicts with more entries hold data, not a policy."""

_MOST = 2000
"""How many objects beside the closures are looked at; the nearest come first."""

_FOREIGN = ("builtins", "gymnasium", "logging", "mujoco", "numpy", "torch")
"""Packages whose functions and objects hold nobody's policy."""

_VALUES = (
    *(Tensor, str, bytes, int, float, complex, bool, type(None), type, range, slice),
    *(torch.dtype, torch.device, torch.Size, torch.Generator),
)

_NO_OBJECTS = (
    *(*_VALUES, nn.Module, torch.optim.Optimizer, Mapping, Sequence),
    *(types.FunctionType, types.MethodType, types.ModuleType),
)


def reached(
    closures: Iterable[Callable[..., Any]], parameters: Set[int]
) -> Iterator[tuple[Any, bool]]:
    """Yield the modules, objects, dicts and lists that closures lead to.

    They are looked for from a closure on: in its variables, the globals that it names, its
    ``self``, and what these hold in turn.

    Args:
        closures: What a step is taken on.
        parameters: The ``id`` of each.

    Yields:
        Each once, and whether it holds a parameter; of modules only the outermost, of others only
        those that hold one.
    """
    queue = deque[Any](closures)
    most = len(queue) + _MOST
    seen: dict[int, Any] = {}
    while queue and len(seen) < most:
        here = queue.popleft()
        if id(here) in seen or isinstance(here, _VALUES):
            continue
        seen[id(here)] = here
        if isinstance(here, nn.Module):
            own = any(id(each) in parameters for each in here.parameters())
            yield here, own
            if own:
                continue
        children = list(_children(here))
        if any(id(child) in parameters for child in children) and _may_hold(here):
            yield here, True
        queue.extend(children)


def attributes(value: Any) -> dict[str, Any]:
    """Return the attributes of a plain object, without running any code of its class.

    Args:
        value: With a ``__dict__``, which is returned itself, or with slots alone.
    """
    if hasattr(value, "__dict__"):
        own: dict[str, Any] = vars(value)
        return own
    slots = {
        name: slot
        for kind in type(value).__mro__
        for name, slot in vars(kind).items()
        if isinstance(slot, types.MemberDescriptorType)
    }
    return {name: getattr(value, name) for name in slots if hasattr(value, name)}


def is_plain_object(value: Any) -> bool:
    """Return whether a value is an object of somebody's class.

    Args:
        value: No module, function, class or container counts.
    """
    return not (_is_foreign(type(value).__module__) or isinstance(value, _NO_OBJECTS))


def _may_hold(value: Any) -> bool:
    """Whether a value that has a parameter among its children is the policy's, not a function."""
    return isinstance(value, dict | list | tuple | deque) or is_plain_object(value)


def _children(value: Any) -> Iterator[Any]:
    """Yield what a value refers to, without running any code of its class."""
    if isinstance(value, types.MethodType):
        yield value.__self__
        yield value.__func__
    elif isinstance(value, functools.partial):
        yield value.func
        yield from value.args
        yield from value.keywords.values()
    elif isinstance(value, types.FunctionType):
        if not _is_foreign(value.__module__):
            yield from _captured(value)
    elif isinstance(value, dict):
        yield from value.values() if len(value) <= LONGEST else ()
    elif isinstance(value, list | tuple | set | frozenset | deque):
        yield from value if len(value) <= LONGEST else ()
    elif isinstance(value, nn.Module) or is_plain_object(value):
        yield from attributes(value).values()
        yield vars(type(value)).get("__call__")


def _captured(function: types.FunctionType) -> Iterator[Any]:
    """Yield a function's variables from outside, its defaults and the globals that it names."""
    yield from map(_content, function.__closure__ or ())
    yield from function.__defaults__ or ()
    yield from (function.__kwdefaults__ or {}).values()
    yield from vars(function).values()
    names = _names(function.__code__)
    for name in names:
        found = function.__globals__.get(name)
        if isinstance(found, types.ModuleType) and not _is_foreign(found.__name__):
            yield from (vars(found).get(each) for each in names)
        else:
            yield found


def _content(cell: types.CellType) -> Any:
    """Return what a variable from outside holds; None where it is not assigned yet."""
    with contextlib.suppress(ValueError):
        return cell.cell_contents
    return None


@functools.lru_cache(maxsize=1000)
def _names(code: types.CodeType) -> frozenset[str]:
    """Return the names of globals and attributes in a function and in those defined inside."""
    inner = (each for each in code.co_consts if isinstance(each, types.CodeType))
    return frozenset(code.co_names).union(*map(_names, inner))


def _is_foreign(module: str | None) -> bool:
    return (module or "").partition(".")[0] in _FOREIGN
