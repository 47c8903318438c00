"""In which precision a KL was computed, and which differences that resolves."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

__all__ = ["computed_in", "resolution"]

_CAST = "ToCopyBackward0"
_MEANS = {
    _CAST,
    *("MeanBackward0", "MeanBackward1", "SumBackward0", "SumBackward1"),
    *("DivBackward0", "MulBackward0", "ViewBackward0", "ReshapeAliasBackward0"),
}
"""The nodes of a mean, or of a weighted one, and of a cast."""


def computed_in(value: Tensor) -> torch.dtype:
    """Return the type that a KL had before a cast, if only its mean was taken after that.

    Args:
        value: The KL, with its graph or without.
    """
    node: Any = value.grad_fn
    while node is not None and node.name() in _MEANS:
        behind = [each for each in node.next_functions if each[0] is not None]
        if len(behind) != 1:
            return value.dtype
        ((source, place),) = behind
        if node.name() == _CAST:
            return _coarser(value.dtype, source._input_metadata[place].dtype)
        node = source
    return value.dtype


def _coarser(one: torch.dtype, other: torch.dtype) -> torch.dtype:
    return max(one, other, key=lambda each: torch.finfo(each).eps)


def resolution(dtype: torch.dtype) -> float:
    """Return which KLs, in nats, rounding leaves nothing of: sums in half precision have bias.

    Args:
        dtype: In which they are computed.
    """
    eps = torch.finfo(dtype).eps
    return 50 * eps if dtype in (torch.float16, torch.bfloat16) else min(10 * eps, 1e-6)
