"""Masks over a batch: true where an element counts, false for padding."""

from __future__ import annotations

import torch
from torch import Tensor

from trpo_optim.errors import TrustRegionError

__all__ = ["checked_mask", "masked_mean", "require_fit"]


def checked_mask(mask: Tensor) -> Tensor:
    """Return a mask as one of bools, after checking that something in it is true."""
    if mask.dtype is not torch.bool and bool(((mask != 0) & (mask != 1)).any()):
        raise TrustRegionError(
            f"The mask is {mask.dtype} with values other than 0 and 1. Pass a mask of bools."
        )
    chosen = mask.bool()
    if not chosen.any():
        raise TrustRegionError(
            f"The mask of shape {tuple(mask.shape)} is all false: there is nothing to average."
        )
    return chosen


def masked_mean(values: Tensor, mask: Tensor | None) -> Tensor:
    """Return the mean of the values where a mask is true; None: of all."""
    if mask is None:
        return values.mean()
    require_fit(mask, values)
    return values.masked_fill(~mask, 0).sum() / mask.sum()


def require_fit(mask: Tensor, values: Tensor) -> None:
    """Check that a mask has the shape of the batch."""
    if mask.shape != values.shape:
        raise TrustRegionError(
            f"The mask has shape {tuple(mask.shape)} and the batch {tuple(values.shape)}."
        )
