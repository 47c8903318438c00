"""Tensors of which every rank holds a part (``DTensor``): the whole of one, the part of a whole."""

from __future__ import annotations

import sys
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from trpo_optim.errors import TrustRegionError

__all__ = ["is_sharded", "local", "part_like", "require_differentiable", "whole"]


def require_differentiable(parameters: Iterable[Tensor]) -> None:
    """Check that torch can differentiate twice with respect to parameters in parts.

    Args:
        parameters: Plain ones, ``DTensor`` ones, or both.

    Raises:
        TrustRegionError: If some are in parts and it cannot: their curvature would be taken for 0.
    """
    if torch.__version__ < "2.13" and any(map(is_sharded, parameters)):
        raise TrustRegionError(
            f"Some parameters are DTensors, which torch {torch.__version__} cannot differentiate "
            "twice. Use torch 2.13 or later. Or keep a whole copy on every rank, plain or in "
            "DistributedDataParallel, and pass process_group."
        )


def is_sharded(tensor: Tensor) -> bool:
    """Return whether a tensor is a ``DTensor``.

    Args:
        tensor: Plain, or a ``DTensor``.
    """
    return _as_sharded(tensor) is not None


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
    if type(tensor) in (Tensor, nn.Parameter):
        return None
    kinds = sys.modules.get("torch.distributed.tensor")  # not imported: then there is none
    return tensor if kinds is not None and isinstance(tensor, kinds.DTensor) else None
