"""What is one action: the dimensions of a distribution, and the parts of a policy."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.distributions import Categorical, Distribution

from trpo_optim.distributions.parts import name_of
from trpo_optim.errors import TrustRegionError

__all__ = ["batch_dims_within", "draws_whole_actions", "over_action", "require_plain", "summed"]


def over_action(values: Tensor, dist: Distribution, batch_dims: int | None, place: str) -> Tensor:
    """Sum a KL or log-probabilities over the dimensions that belong to the action.

    Args:
        values: The distribution's batch shape, after any dimensions of several samples.
        dist: What they are of.
        batch_dims: How many dimensions the batch has. None: the distribution has to tell.
        place: Where in the policy it is, for messages.

    Returns:
        The batch's shape.

    Raises:
        TrustRegionError: If it is not plain which dimensions those are.
    """
    if batch_dims is None:
        require_plain(values.shape, dist, place)
        return values
    if values.dim() < batch_dims:
        raise TrustRegionError(
            f"The mask has {batch_dims} dimensions, and {name_of(dist)}{place} has batch shape "
            f"{tuple(values.shape)}. Give the mask the batch's shape."
        )
    if values.dim() == batch_dims:
        return values
    _require_one_action(values, dist, batch_dims, place)
    return values.flatten(batch_dims).sum(-1)


def _require_one_action(values: Tensor, dist: Distribution, batch_dims: int, place: str) -> None:
    """Check that the dimensions that a mask lacks are those of one action, not of a sequence.

    A sequence may be padded, and a mask of one number per sequence cannot say where. Only a
    distribution of single numbers, such as a Normal, may have them.

    Raises:
        TrustRegionError: If each of its draws is a whole action: a vector, or a token.
    """
    if not draws_whole_actions(dist):
        return
    raise TrustRegionError(
        f"The mask is {batch_dims}-dimensional, and {name_of(dist)}{place} has batch shape "
        f"{tuple(values.shape)}. If it holds sequences, give the mask the batch's shape, true "
        "where there is no padding, and pass per='sequence' for the KL of whole sequences. If "
        f"the further dimensions are one action, wrap it in Independent(dist, "
        f"{values.dim() - batch_dims})."
    )


def draws_whole_actions(dist: Distribution) -> bool:
    """Return whether each draw of a distribution is a whole action: a vector, or a token."""
    return bool(dist.event_shape) or isinstance(dist, Categorical)


def require_plain(batch_shape: torch.Size, dist: Distribution, place: str) -> None:
    """Check that a distribution's shapes tell its action's dimensions from the batch's.

    Args:
        batch_shape: Of the distribution.
        dist: The distribution.
        place: Where in the policy it is, for messages.

    Raises:
        TrustRegionError: If its batch has several dimensions and its event none.
    """
    if len(batch_shape) > 1 and not dist.event_shape:
        shape = tuple(batch_shape)
        raise TrustRegionError(
            f"{name_of(dist)}{place} has batch shape {shape} and no event shape, so dimensions "
            "of the action and of the batch look alike. If the last dimension is the action's, "
            "wrap it in Independent(dist, 1). If every element is an action of its own, pass "
            f"mask=torch.ones({shape}, dtype=torch.bool)."
        )


def batch_dims_within(dist: Any, batch_dims: int | None) -> int | None:
    """Return how many dimensions the batch of a policy's parts has.

    Args:
        dist: A policy of several parts.
        batch_dims: As the mask says. None: there is none.

    Returns:
        The same, or what the policy itself says where it is a distribution, too.
    """
    known = batch_dims is None and isinstance(dist, Distribution)
    return len(dist.batch_shape) if known else batch_dims


def summed(parts: Sequence[Tensor]) -> Tensor:
    """Add up numbers of a policy's parts.

    Args:
        parts: Tensors of the batch's shape.

    Returns:
        Their sum.

    Raises:
        TrustRegionError: If there are none, or their shapes differ.
    """
    if not parts:
        raise TrustRegionError(
            "The policy is an empty tuple or dict. Return one distribution per part."
        )
    shapes = sorted({tuple(part.shape) for part in parts})
    if len(shapes) > 1:
        raise TrustRegionError(
            f"The parts of the policy have the batch shapes {shapes}; all must have the same. Wrap "
            "the parts with more dimensions in Independent."
        )
    return torch.stack(list(parts)).sum(0)
