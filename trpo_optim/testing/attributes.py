"""What a module keeps in plain attributes: neither parameters nor buffers nor modules."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from types import BuiltinFunctionType, FunctionType, MethodType, ModuleType
from typing import Any

import torch
from torch import Tensor, nn

from trpo_optim.closure.random_state import putting_back

__all__ = ["Attributes"]

_MODULES_OWN = frozenset(vars(nn.Module()))
"""Attributes that every module has."""

_CONTAINERS = (dict, list, deque, set)
_MADE_ONCE = (nn.Module, type, ModuleType, FunctionType, BuiltinFunctionType, MethodType)

_MOST = 20_000
"""Objects of one attribute that are looked at; what holds more is no state of a policy."""


class Attributes:
    """A copy of the plain attributes of a module and those within it, and of what they hold.

    Args:
        module: The module. None: there is nothing to copy.
    """

    def __init__(self, module: nn.Module | None) -> None:
        self._modules = [
            (f"{prefix}." if prefix else "", each, _plain(each))
            for prefix, each in ([] if module is None else module.named_modules())
        ]
        self._held = {
            prefix + name: [(each, _content(each)) for each in _within(value)]
            for prefix, _, attributes in self._modules
            for name, value in attributes.items()
        }

    def changed(self) -> list[str]:
        """Return the names of the attributes that are no longer what they were."""
        found = []
        for prefix, module, were in self._modules:
            now = _plain(module)
            found += [
                prefix + name
                for name in {**were, **now}
                if not _same(now.get(name), were.get(name))
                or any(not _is(each, was) for each, was in self._held.get(prefix + name, []))
            ]
        return found

    @torch.no_grad()
    def restore(self) -> None:
        """Put all back, what is inside first."""
        for held in self._held.values():
            for each, was in held:
                if callable(was) or not _is(each, was):
                    _put(each, was)
        for _, module, were in self._modules:
            for name in _plain(module):
                del vars(module)[name]
            vars(module).update(were)


def _plain(module: nn.Module) -> dict[str, Any]:
    return {name: each for name, each in vars(module).items() if name not in _MODULES_OWN}


def _within(value: Any) -> Iterator[Any]:
    """Yield tensors, arrays, generators, containers and objects that a value consists of."""
    stack, seen = [value], dict[int, Any]()
    while stack and len(seen) < _MOST:
        each = stack.pop()
        if id(each) in seen or isinstance(each, (*_MADE_ONCE, nn.Parameter)):
            continue
        seen[id(each)] = each
        if isinstance(each, tuple):
            stack.extend(each)
            continue
        content = _content(each)
        if content is None:
            continue
        yield each
        if isinstance(content, _CONTAINERS):
            stack.extend(content.values() if isinstance(content, dict) else content)


def _content(value: Any) -> Any:
    """Return a copy of what an object holds, or None if it holds nothing that may change.

    Of a generator it is what puts its state back.
    """
    if isinstance(value, Tensor):
        return value.detach().clone()
    if isinstance(value, _CONTAINERS) or _is_numpy(value, "ndarray"):
        return value.copy()
    if put_back := putting_back(value):
        return put_back
    return dict(vars(value)) if hasattr(value, "__dict__") else None


def _is(value: Any, was: Any) -> bool:
    """Return whether an object still holds what it held; generators may be drawn from."""
    if callable(was):
        return True
    whole = isinstance(value, (*_CONTAINERS, Tensor)) or _is_numpy(value, "ndarray")
    now = value if whole else vars(value)
    if isinstance(was, dict):
        return now.keys() == was.keys() and all(_same(now[name], was[name]) for name in was)
    if isinstance(was, list | deque):
        return len(now) == len(was) and all(map(_same, now, was))
    return bool(now == was) if isinstance(was, set) else _same(now, was)


def _same(now: Any, was: Any) -> bool:
    """Return whether a value is another one, or a tensor, an array or a number equal to it."""
    if now is was:
        return True
    if isinstance(now, Tensor) and isinstance(was, Tensor):
        return now.shape == was.shape and torch.equal(
            now.detach().nan_to_num(), was.detach().nan_to_num()
        )
    if _is_numpy(now, "ndarray") and _is_numpy(was, "ndarray"):
        return now.shape == was.shape and bool((now == was).all())
    return isinstance(now, int | float | str) and type(now) is type(was) and now == was


def _put(value: Any, was: Any) -> None:
    """Have an object hold what it held."""
    if isinstance(value, Tensor):
        value.copy_(was)
    elif callable(was):
        was()
    elif isinstance(value, list):
        value[:] = was
    elif isinstance(value, deque):
        value.clear()
        value.extend(was)
    elif _is_numpy(value, "ndarray"):
        value[...] = was
    else:
        held = value if isinstance(value, dict | set) else vars(value)
        held.clear()
        held.update(was)


def _is_numpy(value: Any, name: str) -> bool:
    return type(value).__module__.startswith("numpy") and type(value).__name__ == name
