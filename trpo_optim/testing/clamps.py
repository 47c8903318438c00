"""Clamps in a graph: what they take, their bounds, and which parameters lie at these."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from trpo_optim.closure.parameters import ParameterVector

__all__ = ["NEAR", "at_bounds", "beyond", "is_clamp"]

_CLAMPS = {"Clamp", "ClampMin", "ClampMax", "Hardtanh", "Maximum", "Minimum"}

NEAR = 0.02
"""How close to its bound a number is that moves of the checks take beyond it."""


def is_clamp(node: Any) -> bool:
    """Return whether an operation of autograd is a clamp."""
    return node.name().rstrip("01").removesuffix("Backward") in _CLAMPS


def beyond(node: Any) -> Tensor:
    """Return which entries of a clamp's input lie outside its bounds."""
    value, low, high = _bounds(node)
    outside = torch.zeros_like(value, dtype=torch.bool)
    if low is not None:
        outside |= value < low
    if high is not None:
        outside |= value > high
    return outside


def at_bounds(roots: Iterable[Any], vector: ParameterVector, tensors: Sequence[Tensor]) -> Tensor:
    """Return which numbers of a vector lie at the bound of a clamp of these, or close to it.

    The policy has a kink there: it follows moves to one side only.

    Args:
        roots: Where graphs begin. One graph after the other is looked at.
        vector: The parameters.
        tensors: What the graphs know them as.

    Returns:
        A mask, (n,).
    """
    found = dict[int, Tensor]()
    for root in roots:
        for key, close in _at_bounds_of(root, set(map(id, tensors))).items():
            found[key] = found[key] | close if key in found else close
    masks = [found.get(id(each)) for each in tensors]
    kind = vector.dtype
    return vector.gather([None if each is None else each.to(kind) for each in masks]) > 0


def _at_bounds_of(root: Any, known: set[int]) -> dict[int, Tensor]:
    """Return the masks of the parameters of one graph, by identity."""
    found = dict[int, Tensor]()
    stack, seen = [root], set[Any]()
    while stack:
        node = stack.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        below = [each for each, _ in node.next_functions]
        stack.extend(below)
        owners = [getattr(each, "variable", None) for each in below]
        owner = next((each for each in owners if id(each) in known), None)
        if owner is None or not is_clamp(node):
            continue
        value, *ends = _bounds(node)
        if value.shape != owner.shape:
            continue
        close = torch.zeros_like(value, dtype=torch.bool)
        for end in ends:
            if end is not None:
                close |= (value - end).abs() <= NEAR
        if close.any():
            found[id(owner)] = found.get(id(owner), torch.zeros_like(close)) | close
    return found


def _bounds(node: Any) -> tuple[Tensor, Any, Any]:
    """Return what a clamp takes, its lower and its upper bound, None where there is none."""
    value: Tensor = node._saved_self.detach()
    if node.name().startswith(("Minimum", "Maximum")):
        first, second = (each is not None for each, _ in node.next_functions)
        if first and second:
            return value, None, None
        other = node._saved_other.detach()
        value, bound = (value, other) if first else (other, value)
        return (value, None, bound) if node.name().startswith("Minimum") else (value, bound, None)
    low, high = (
        getattr(node, f"_saved_{side}", getattr(node, f"_saved_{side}_val", None))
        for side in ("min", "max")
    )
    return value, low, high
