"""Which bytes a tensor takes, and whether two tensors have some in common."""

from __future__ import annotations

import functools
import math
from bisect import bisect_left
from collections.abc import Iterable, Iterator
from itertools import accumulate, product

import torch
from torch import Tensor, nn

__all__ = ["Spans", "is_plain", "repeats", "share_memory", "span"]

_Dimensions = tuple[tuple[int, int], ...]
"""Strides in bytes, rising, and sizes: a tensor's elements by where they lie after the first."""


class Spans:
    """Where tensors lie, to find quickly whether another one touches any of them.

    A look at storages alone would miss memory that came through NumPy, which has a storage of its
    own.

    Args:
        tensors: Strided tensors.
    """

    def __init__(self, tensors: Iterable[Tensor]) -> None:
        lying = [(*span(each)[1:], each) for each in tensors if each.numel()]
        lying.sort(key=lambda each: each[0])
        self._tensors = [each for _, _, each in lying]
        self._starts = [start for start, _, _ in lying]
        self._ends = list(accumulate((end for _, end, _ in lying), max))

    def touch(self, tensor: Tensor) -> bool:
        """Return whether a strided tensor shares memory with one of them."""
        start = tensor.data_ptr()
        before = bisect_left(self._starts, start + _extent(_dimensions(tensor)))
        while before and self._ends[before - 1] > start:
            before -= 1
            if share_memory(tensor, self._tensors[before]):
                return True
        return False


def is_plain(tensor: Tensor) -> bool:
    """Return whether a tensor is strided and of no subclass, so that its bytes can be told.

    Args:
        tensor: Any.
    """
    return type(tensor) in (Tensor, nn.Parameter) and tensor.layout == torch.strided


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


def repeats(tensor: Tensor) -> bool:
    """Return whether one element in memory stands for several of a tensor.

    Args:
        tensor: A strided tensor.
    """
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


def span(tensor: Tensor) -> tuple[str, int, int]:
    """Return where a tensor lies: its device, and where its bytes begin and end.

    Args:
        tensor: A strided tensor.
    """
    start = tensor.data_ptr()
    return str(tensor.device), start, start + _extent(_dimensions(tensor))
