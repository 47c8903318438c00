"""The trainable parameters as one flat vector, and the vector as parameters."""

from __future__ import annotations

import functools
import math
from collections.abc import Iterable, Iterator, Sequence
from itertools import compress, product, repeat
from typing import Any

import torch
from torch import Tensor, nn

from trpo_optim.closure.dtensor import local, part_like, require_differentiable, whole
from trpo_optim.errors import TrustRegionError
from trpo_optim.torch_private import copy_each, norm_of_each

__all__ = ["ParameterVector", "require_real", "share_memory", "trainable"]

_Dimensions = tuple[tuple[int, int], ...]
"""Strides in bytes, rising, and sizes: a tensor's elements by where they lie after the first."""


class ParameterVector:
    """Trainable parameters in a fixed order, gathered into and scattered from one vector.

    Vectors are at least float32, so that the solve does not lose the precision that half-precision
    parameters lack. Of parameters that several ranks hold in parts (``DTensor``) every one of these
    ranks has the whole vector.

    Args:
        parameters: The parameters, all on one device; those that occur twice are taken once.

    Raises:
        TrustRegionError: If there are none, they lie on several devices or on "meta", or torch is
            too old for those that are in parts.
    """

    def __init__(self, parameters: Iterable[Tensor]) -> None:
        self.parameters = tuple(dict.fromkeys(parameters))
        if not any(parameter.numel() for parameter in self.parameters):
            raise TrustRegionError(
                "No parameter requires a gradient, so a step has nothing to move. Call "
                "requires_grad_(True) on the parameters to train."
            )
        require_differentiable(self.parameters)
        devices = sorted({str(parameter.device) for parameter in self.parameters})
        if len(devices) > 1:
            raise TrustRegionError(
                f"The parameters lie on several devices ({', '.join(devices)}); they must lie on "
                "one device. Move the policy with .to(device)."
            )
        self.device = self.parameters[0].device
        if self.device.type == "meta":
            raise TrustRegionError(
                "The parameters lie on the device 'meta', which holds shapes and no values; a step "
                "needs values. Call policy.to_empty(device=...), load or initialise the values, "
                "and then make the optimizer from policy.parameters()."
            )
        self.dtype = functools.reduce(
            torch.promote_types, (parameter.dtype for parameter in self.parameters), torch.float32
        )
        self.precision = max(torch.finfo(each.dtype).eps for each in self.parameters)
        self._sizes = [parameter.numel() for parameter in self.parameters]
        self._begins_oddly = any(size % 2 for size in self._sizes[:-1])

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
        return [_of_dtype(each.reshape(-1), self.dtype) for each in dense]

    def joined(self, tensors: Sequence[Tensor | None]) -> list[Tensor]:
        """Return tensors shaped like the parameters in as few pieces of a vector as may be.

        One piece is fastest. Its derivative's pieces may begin at an odd place in memory, where
        complex numbers cannot begin. So there are as many pieces as parameters if one could.
        """
        flat = self.flat(tensors)
        return flat if self._begins_oddly else [torch.cat(flat)]

    def split_as_joined(self, vector: Tensor) -> list[Tensor]:
        """Return a vector in the pieces that ``joined`` returns."""
        return self.split(vector) if self._begins_oddly else [vector]

    def split(self, vector: Tensor) -> list[Tensor]:
        """Return a vector's pieces, one for each parameter; none begins at an odd place."""
        return [
            piece.clone() if piece.storage_offset() % 2 else piece
            for piece in torch.split(vector, self._sizes)
        ]

    def scatter(self, vector: Tensor) -> list[Tensor]:
        """Return a vector's pieces in the parameters' shapes and dtypes."""
        return [
            part_like(_of_dtype(piece.view(parameter.shape), parameter.dtype), parameter)
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


def _of_dtype(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """Return what ``to`` does, without a call of torch where it would do nothing."""
    return tensor if tensor.dtype is dtype else tensor.to(dtype)


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
                "point. Keep integers in buffers, and view complex parameters as real "
                "(torch.view_as_real)."
            )


def trainable(groups: Sequence[dict[str, Any]]) -> list[Tensor]:
    """Return the parameters that require a gradient, each of which has memory of its own.

    Args:
        groups: ``param_groups``.

    Raises:
        TrustRegionError: If an element in memory belongs to two parameters, or stands for several
            elements of one: a step would move it more than once. They are named.
    """
    names: dict[Tensor, str] = {}
    for index, group in enumerate(groups):
        place = f" of param_groups[{index}]" if index and "param_names" not in group else ""
        for name, parameter in zip(
            group.get("param_names", range(len(group["params"]))), group["params"], strict=True
        ):
            if parameter.requires_grad:
                names.setdefault(parameter, f"{name!r}{place}")
    held = {each: local(each) for each in names if each.device.type != "meta"}
    spans = [(each, _span(mine)) for each, mine in held.items() if _lies_in_memory(mine)]
    order = {each: index for index, each in enumerate(names)}
    before: list[tuple[Tensor, tuple[str, int, int]]] = []
    for parameter, (device, start, end) in sorted(spans, key=lambda pair: pair[1]):
        if _repeats(held[parameter]):
            raise TrustRegionError(
                f"Parameter {names[parameter]} has {parameter.numel()} elements, and several of "
                "them are one number in memory, as after expand(); every element must have its "
                "own. Optimize the tensor before expand(), and expand it in forward()."
            )
        before = [pair for pair in before if pair[1][0] == device and pair[1][2] > start]
        for other, _ in before:
            if share_memory(held[other], held[parameter]):
                first, second = sorted((other, parameter), key=order.__getitem__)
                raise TrustRegionError(
                    f"Parameters {names[first]} and {names[second]} are two tensors that share "
                    "memory; every parameter must have its own. Tie them as one parameter "
                    "(b.weight = a.weight, not b.weight.data = a.weight.data), or clone() one."
                )
        before.append((parameter, (device, start, end)))
    return list(names)


def share_memory(first: Tensor, second: Tensor) -> bool:
    """Return whether two tensors have an element, or a part of one, in common.

    Columns of one matrix lie between each other and have none.

    Args:
        first: A strided tensor.
        second: Another, on the same device.
    """
    if not (first.numel() and second.numel()):
        return False
    offset = second.data_ptr() - first.data_ptr()
    return _overlap(offset, _dimensions(first), _dimensions(second))


@functools.lru_cache(maxsize=1024)
def _overlap(offset: int, first: _Dimensions, second: _Dimensions) -> bool:
    """Return whether bytes coincide; the second's begin at an offset from the first's."""
    if offset >= _extent(first) or -offset >= _extent(second):
        return False
    if len(first) == len(second) == 1:  # without gaps
        return True
    period = math.gcd(*(stride for stride, _ in first[1:] + second[1:]))
    if offset % period >= first[0][1] and offset % period + second[0][1] <= period:
        return False  # as columns of one matrix lie
    covered = _covered(first)
    for start, stride, size in _runs(second, offset):
        skipped = max(0, -(start // stride))  # before the first's bytes
        end = max(0, start + (size - 1) * stride + 1)
        if 1 in covered[start + skipped * stride : end : stride]:
            return True
    return False


def _repeats(tensor: Tensor) -> bool:
    """Return whether one element in memory stands for several of a tensor."""
    dimensions, reach = _dimensions(tensor), 0
    distinct = math.prod(size for _, size in dimensions)
    for stride, size in dimensions:
        if stride <= reach:
            distinct = _covered(dimensions).count(1)
            break
        reach += stride * (size - 1)
    return distinct < tensor.numel() * tensor.element_size()


def _dimensions(tensor: Tensor) -> _Dimensions:
    """Return where a tensor's bytes lie; dimensions that follow without a gap are one."""
    width = tensor.element_size()
    if tensor.is_contiguous():
        return ((1, width * tensor.numel()),)
    pairs = zip(tensor.stride(), tensor.shape, strict=True)
    found = [(1, width)]
    for stride, size in sorted((width * stride, n) for stride, n in pairs if n > 1 and stride > 0):
        last, count = found[-1]
        if stride == last * count:
            found[-1] = (last, count * size)
        else:
            found.append((stride, size))
    return tuple(found)


def _covered(dimensions: _Dimensions) -> bytearray:
    """Return a 1 for every byte that is an element's, 0 for those between."""
    covered = bytearray(_extent(dimensions))
    for start, stride, size in _runs(dimensions, 0):
        covered[start : start + (size - 1) * stride + 1 : stride] = b"\1" * size
    return covered


def _runs(dimensions: _Dimensions, start: int) -> Iterator[tuple[int, int, int]]:
    """Yield start, stride and size along the longest dimension, for all others."""
    *others, longest = sorted(dimensions, key=lambda dimension: dimension[1])
    for places in product(*(range(0, stride * size, stride) for stride, size in others)):
        yield start + sum(places), *longest


def _extent(dimensions: _Dimensions) -> int:
    return 1 + sum(stride * (size - 1) for stride, size in dimensions)


def _span(tensor: Tensor) -> tuple[str, int, int]:
    start = tensor.data_ptr()
    return str(tensor.device), start, start + _extent(_dimensions(tensor))


def _lies_in_memory(tensor: Tensor) -> bool:
    plain = type(tensor) in (Tensor, nn.Parameter) and tensor.layout == torch.strided
    return plain and tensor.numel() > 0
