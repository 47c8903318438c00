"""Copies of a policy's distribution that no step moves."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import Any, TypeVar

from torch.distributions import Distribution

from trpo_optim.distributions.parts import (
    constant_transforms,
    inverses,
    leaves,
    made_of,
    require_valid,
    tensors,
)

__all__ = ["PolicyT", "frozen"]

PolicyT = TypeVar("PolicyT", bound="Distribution | Mapping[str, Any] | Sequence[Any]")
"""A distribution, or a dict or tuple of independent distributions, one per part of the action."""


def frozen(dist: PolicyT) -> PolicyT:
    """Return a copy to keep as the old policy. It shares no graph and no memory.

    Args:
        dist: The distribution, or a dict or tuple of distributions.

    Returns:
        The same families with detached clones of all tensors.

    Raises:
        TrustRegionError: If a parameter is NaN or outside its bounds, such as a scale of zero.

    Example:
        >>> import torch
        >>> from torch.distributions import Categorical
        >>> from trpo_optim import frozen
        >>> logits = torch.zeros(2, requires_grad=True)
        >>> old = frozen(Categorical(logits=logits))
        >>> old.logits.requires_grad
        False
    """
    for part in leaves(dist):
        require_valid(part)
    memo: dict[int, Any] = {id(each): each.detach().clone() for each in tensors(dist)}
    for part in leaves(dist):
        for inner in made_of(part):
            memo |= {id(each): each for each in constant_transforms(inner)}
    for inverse in inverses(dist):  # a copy of one made by torch would forget what it inverts
        memo[id(inverse)] = copy.deepcopy(inverse.inv, memo).inv
    return copy.deepcopy(dist, memo)
