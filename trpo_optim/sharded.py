"""Tensors of which every rank holds a part (``DTensor``): the whole of one, the part of a whole."""

from __future__ import annotations

import sys
from typing import Any

from torch import Tensor

__all__ = ["local", "part_like", "whole"]


def whole(tensor: Tensor) -> Tensor:
    """Return a tensor as one that this rank holds all of; all ranks of its mesh must ask.

    Args:
        tensor: Plain, or a ``DTensor``.
    """
    sharded = _as_sharded(tensor)
    full: Tensor = tensor if sharded is None else sharded.full_tensor()
    return full


def part_like(tensor: Tensor, parameter: Tensor) -> Tensor:
    """Return a whole tensor in parts as a parameter is, without communication.

    Args:
        tensor: Of the parameter's shape, the same on all ranks.
        parameter: Plain, or a ``DTensor``.
    """
    sharded = _as_sharded(parameter)
    if sharded is None:
        return tensor
    kinds, mesh = sys.modules["torch.distributed.tensor"], sharded.device_mesh
    everywhere = [kinds.Replicate()] * mesh.ndim
    copies = kinds.DTensor.from_local(tensor, mesh, everywhere, run_check=False)
    part: Tensor = copies.redistribute(placements=sharded.placements)
    return part


def local(tensor: Tensor) -> Tensor:
    """Return what this rank holds of a tensor, in the same memory.

    Args:
        tensor: Plain, or a ``DTensor``.
    """
    sharded = _as_sharded(tensor)
    held: Tensor = tensor if sharded is None else sharded.detach().to_local()
    return held


def _as_sharded(tensor: Tensor) -> Any:
    """Return a tensor if it is a ``DTensor``, else None."""
    kinds = sys.modules.get("torch.distributed.tensor")  # not imported: then there is none
    return tensor if kinds is not None and isinstance(tensor, kinds.DTensor) else None
