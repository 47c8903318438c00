"""Whether objects are the same constants, attribute by attribute, as transforms are compared."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Iterator, Mapping
from types import FunctionType, MethodType
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributions import Distribution
from torch.distributions.transforms import Transform
from torch.distributions.utils import lazy_property

from trpo_optim.torch_private import InverseTransform

__all__ = ["alike", "learned"]

_OF_CALLS = {"_cached_x_y", "_cache_size", "_inv"}
"""Attributes of transforms that say what was computed before, not what is computed."""

_DERIVED = (lazy_property, functools.cached_property)
"""What classes hold in place of attributes that are made of others when they are asked for."""


def alike(left: Any, right: Any) -> bool:
    """Return whether two objects have one type and equal attributes, down to their tensors.

    ``__eq__`` is asked only where an object has no attributes of its own, or defines it and is
    neither a transform, a distribution nor a module: many of these compare by type or by identity.

    Args:
        left: Any object: a transform, a container, a function.
        right: Another one.
    """
    stack, seen = [(left, right)], dict[tuple[int, int], Any]()  # which live as long as their ids
    while stack:
        ours, theirs = stack.pop()
        if ours is theirs or (id(ours), id(theirs)) in seen:
            continue
        seen[id(ours), id(theirs)] = ours, theirs
        if isinstance(ours, Tensor | int | float) and isinstance(theirs, Tensor | int | float):
            if not _equal_numbers(ours, theirs):
                return False
            continue
        if type(ours) is not type(theirs):
            return False
        pieces, others = _pieces(ours), _pieces(theirs)
        if pieces is None or others is None:
            if not _equal(ours, theirs):
                return False
        elif pieces.keys() != others.keys():
            return False
        else:
            stack.extend((pieces[name], others[name]) for name in pieces)
    return True


def learned(value: Any) -> bool:
    """Return whether an object holds a tensor that requires a gradient, at any depth."""
    return any(each.requires_grad for each in _tensors(value))


def _tensors(value: Any) -> Iterator[Tensor]:
    stack, seen = [value], dict[int, Any]()
    while stack:
        each = stack.pop()
        if id(each) in seen:
            continue
        seen[id(each)] = each
        if isinstance(each, Tensor):
            yield each
        else:
            stack.extend((_pieces(each) or {}).values())


def _pieces(value: Any) -> dict[Any, Any] | None:
    """Return what an object is made of, by name, or None if it is compared as a whole."""
    if isinstance(value, Mapping):
        return dict(value)
    if isinstance(value, list | tuple):
        return dict(enumerate(value))
    if isinstance(value, FunctionType):
        captured = inspect.getclosurevars(value).nonlocals
        return {0: value.__code__, 1: value.__defaults__, 2: value.__kwdefaults__, **captured}
    if isinstance(value, MethodType):
        return {0: value.__self__, 1: value.__func__}
    if isinstance(value, functools.partial):
        return {0: value.func, 1: value.args, 2: value.keywords}
    if isinstance(value, type) or not hasattr(value, "__dict__"):
        return None
    compares_parts = isinstance(value, Transform | Distribution | nn.Module)
    if not compares_parts and "__eq__" in _names_within(type(value)):
        return None
    if isinstance(value, InverseTransform):
        return {0: value.inv}
    return {
        name: each
        for name, each in vars(value).items()
        if name not in _OF_CALLS and not isinstance(getattr(type(value), name, None), _DERIVED)
    }


def _names_within(kind: type) -> set[str]:
    """Return what a class and those above it define, but for object."""
    return {name for each in kind.__mro__[:-1] for name in vars(each)}


def _equal_numbers(left: Tensor | float, right: Tensor | float) -> bool:
    """Return whether numbers are equal; one number may stand for a tensor full of it."""
    if isinstance(left, Tensor) and isinstance(right, Tensor) and left.shape != right.shape:
        return False
    return bool(torch.as_tensor(left == right).all())


def _equal(left: Any, right: Any) -> bool:
    same = left == right
    return bool(same.all() if hasattr(same, "all") else same)  # an array has one answer an entry
