"""Masks over a batch: true where an element counts, false for padding."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from trpo_optim.distributions.arguments import require_tensor
from trpo_optim.errors import TrustRegionError

__all__ = ["Per", "checked_mask", "masked_mean", "of_sequences", "require_fit", "require_per"]

Per = Literal["token", "sequence"]
"""What a mean is taken over: elements of the batch, or sequences along its first dimension."""


def checked_mask(mask: Tensor | None) -> Tensor | None:
    """Return a mask as one of bools, after checking that something in it is true; None stays."""
    if mask is None:
        return None
    require_tensor("mask", mask)
    if mask.dtype is not torch.bool and bool(((mask != 0) & (mask != 1)).any()):
        raise TrustRegionError(
            f"The mask is {mask.dtype} with values other than 0 and 1. Pass a boolean mask."
        )
    chosen = mask.bool()
    if not chosen.any():
        raise TrustRegionError(
            f"The mask of shape {tuple(mask.shape)} is all false, so nothing counts. Leave this "
            "batch out."
        )
    return chosen


def masked_mean(values: Tensor, mask: Tensor | None, per: Per = "token") -> Tensor:
    """Return the mean over tokens, or over sequences, of the values where a mask is true.

    Args:
        values: One number per element of the batch; sequences lie along the first dimension.
        mask: Of the same shape. None: all count.
        per: What counts as one: an element, or a sequence with at least one element that counts.

    Returns:
        A scalar.

    Raises:
        TrustRegionError: If the mask or ``per`` does not fit.
    """
    if per == "sequence":
        return of_sequences(values, mask).mean()
    if mask is None:
        return values.mean()
    require_fit(mask, values)
    return values.masked_fill(~mask, 0).sum() / mask.sum()


def of_sequences(values: Tensor, mask: Tensor | None) -> Tensor:
    """Return the sum over each sequence that has an element that counts, as a vector."""
    if values.dim() < 2:
        raise TrustRegionError(
            f"per is 'sequence', and the batch has shape {tuple(values.shape)}; sequences have "
            "shape (N, T) at least. Pass per='token' for a batch of single actions."
        )
    if mask is None:
        return values.flatten(1).sum(1)
    require_fit(mask, values)
    return values.masked_fill(~mask, 0).flatten(1).sum(1)[mask.flatten(1).any(1)]


def require_per(per: str) -> None:
    """Check that ``per`` is one of the two."""
    if per not in ("token", "sequence"):
        raise TrustRegionError(f"per is {per!r}; it must be 'token' or 'sequence'.")


def require_fit(mask: Tensor, values: Tensor) -> None:
    """Check that a mask has the shape of the batch."""
    if mask.shape != values.shape:
        raise TrustRegionError(
            f"The mask has shape {tuple(mask.shape)} and the batch {tuple(values.shape)}. Give the "
            "mask the batch's shape."
        )
