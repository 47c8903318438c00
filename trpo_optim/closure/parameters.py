"""The trainable parameters as one flat vector, and the vector as parameters."""

from __future__ import annotations

import functools
from collections.abc import Iterable, Sequence
from itertools import compress, repeat
from typing import Any

import torch
from torch import Tensor

from trpo_optim.closure.dtensor import local, part_like, require_differentiable, whole
from trpo_optim.errors import TrustRegionError
from trpo_optim.torch_private import copy_each, norm_of_each

__all__ = ["ParameterVector", "require_real"]


class ParameterVector:
    """Trainable parameters in a fixed order, gathered into and scattered from one vector.

    Vectors are at least float32, so that the solve does not lose the precision that half-precision
    parameters lack. Of parameters that several ranks hold in parts (``DTensor``) every one of these
    ranks has the whole vector.

    Args:
        parameters: The parameters, all on one device; those that occur twice are taken once.

    Raises:
        TrustRegionError: If there are none, they lie on several devices, or torch is too old for
            those that are in parts.
    """

    def __init__(self, parameters: Iterable[Tensor]) -> None:
        self.parameters = tuple(dict.fromkeys(parameters))
        if not any(parameter.numel() for parameter in self.parameters):
            raise TrustRegionError(
                "No parameter requires a gradient, so there is nothing to step. Call "
                "requires_grad_(True) on those to be trained."
            )
        require_differentiable(self.parameters)
        devices = sorted({str(parameter.device) for parameter in self.parameters})
        if len(devices) > 1:
            raise TrustRegionError(
                f"The parameters lie on several devices ({', '.join(devices)}); one step needs "
                "them on one. Move the policy with .to(device)."
            )
        self.device = self.parameters[0].device
        self.dtype = functools.reduce(
            torch.promote_types, (parameter.dtype for parameter in self.parameters), torch.float32
        )
        self.precision = max(torch.finfo(each.dtype).eps for each in self.parameters)
        self._sizes = [parameter.numel() for parameter in self.parameters]

    def __len__(self) -> int:
        """Return the vectors' length."""
        return sum(self._sizes)

    def shapes(self) -> str:
        """Return the parameters' shapes and types as a text."""
        return ", ".join(f"{each.dtype} {tuple(each.shape)}" for each in self.parameters)

    def current(self) -> Tensor:
        """Return the parameters as they are now, shape (n,)."""
        return self.gather([parameter.detach() for parameter in self.parameters])

    def gather(self, tensors: Sequence[Tensor | None]) -> Tensor:
        """Return tensors shaped like the parameters as one vector; None counts as zeros."""
        return torch.cat(self.flat(tensors))

    def flat(self, tensors: Sequence[Tensor | None]) -> list[Tensor]:
        """Return tensors shaped like the parameters as the pieces of a vector."""
        pieces = [
            whole(torch.zeros_like(parameter) if tensor is None else tensor)
            for tensor, parameter in zip(tensors, self.parameters, strict=True)
        ]
        dense = [each.to_dense() if each.is_sparse else each for each in pieces]
        return [each.reshape(-1).to(self.dtype) for each in dense]

    def split(self, vector: Tensor) -> list[Tensor]:
        """Return a vector's pieces, one for each parameter.

        Each begins where complex numbers may begin in memory, since a parameter may be viewed so.
        """
        return [
            piece.clone() if piece.storage_offset() % 2 else piece
            for piece in torch.split(vector, self._sizes)
        ]

    def scatter(self, vector: Tensor) -> list[Tensor]:
        """Return a vector's pieces in the parameters' shapes and dtypes."""
        return [
            part_like(piece.view(parameter.shape).to(parameter.dtype), parameter)
            for piece, parameter in zip(self.split(vector), self.parameters, strict=True)
        ]

    def reached(self, vector: Tensor) -> list[bool]:
        """Return of every parameter whether a vector is anything but zero there."""
        norms = norm_of_each(torch.split(vector, self._sizes), 1)
        return torch.stack(norms).ne(0).tolist()

    def write(self, values: Sequence[Tensor], chosen: Iterable[bool] = repeat(True)) -> None:
        """Copy values into chosen parameters, in place and in one call that nothing interrupts."""
        pairs = list(compress(zip(self.parameters, values, strict=True), chosen))
        targets, sources = ([local(pair[side]) for pair in pairs] for side in (0, 1))
        if targets:
            with torch.no_grad():
                copy_each(targets, sources)


def require_real(group: dict[str, Any]) -> None:
    """Check that the parameters of a group are real floating point.

    Args:
        group: One of ``param_groups``.

    Raises:
        TrustRegionError: If one is not; it is named.
    """
    names = group.get("param_names", range(len(group["params"])))
    for name, parameter in zip(names, group["params"], strict=True):
        if not parameter.is_floating_point():
            raise TrustRegionError(
                f"Parameter {name!r} is {parameter.dtype}; every parameter must be real floating "
                "point. Leave integers to buffers, and view complex ones as real "
                "(torch.view_as_real)."
            )
