"""What tensors and arrays held before a step, and how it is written back."""

from __future__ import annotations

import sys
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from trpo_optim.closure.dtensor import local
from trpo_optim.errors import TrustRegionError
from trpo_optim.torch_private import version_kept

__all__ = ["ArrayContent", "TensorContent", "same_bits"]

_LARGEST_PARAMETER, _LARGEST_ATTRIBUTE = 2**18, 2**24
"""Frozen parameters and plain attributes of more elements are not copied; to write one is an error.
Buffers are always copied."""

_BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
"""Whole numbers by their size in bytes."""


class TensorContent:
    """A tensor and what it held.

    Args:
        tensor: It may be written, and moved to other memory, from now on.
        name: Where it was found.
        buffer: Whether it is a module's buffer.
    """

    def __init__(self, tensor: Tensor, name: str, *, buffer: bool) -> None:
        self.tensor = tensor
        self._name = name
        self._data = local(tensor).data
        self._in_place = tensor.layout == torch.sparse_coo  # whose .data has memory of its own
        self._memory = local(tensor) if self._in_place else _every_element_once(self._data)
        largest = _LARGEST_PARAMETER if isinstance(tensor, nn.Parameter) else _LARGEST_ATTRIBUTE
        copied = buffer or tensor.numel() <= largest
        self._copy = self._memory.detach().clone() if copied else None
        self._version = _version(tensor)

    def rewind(self) -> bool:
        """Put the content back.

        Returns:
            Whether it was moved, as far as this can be told without waiting for the device.

        Raises:
            TrustRegionError: If the tensor was too large to be copied, and was written.
        """
        written = _version(self.tensor) != self._version
        self._version = _version(self.tensor)
        if self._copy is None:
            if written:
                raise TrustRegionError(
                    f"The closure writes {self._name}, a tensor of shape "
                    f"{tuple(self.tensor.shape)}, which is too large to copy and put back. Make it "
                    "a buffer, or write it outside the closure."
                )
            return False
        if not _is_same_memory(local(self.tensor), self._data):  # resized, or given other memory
            self.tensor.data = self._data
        if _is_comparable(self._memory):
            if same_bits(self._memory, self._copy):
                return False  # memory may be read-only
            written = True
        inference = self._memory.is_inference()
        keeping = version_kept(self._memory) if self._in_place and not inference else nullcontext()
        with torch.inference_mode(inference), torch.no_grad(), keeping:
            self._memory.copy_(self._copy)
        return written


class ArrayContent:
    """A NumPy array and what it held.

    Args:
        array: It may be written from now on.
    """

    def __init__(self, array: Any) -> None:
        self._array = array
        self._copy = array.copy()

    def rewind(self) -> bool:
        """Put the content back.

        Returns:
            Whether it was moved.
        """
        if _same_bytes(self._array, self._copy):
            return False
        self._array[...] = self._copy
        return True


def same_bits(left: Tensor, right: Tensor) -> bool:
    """Return whether two tensors of one type hold the same bits: NaN is NaN, and -0 is not 0."""
    if left.layout == torch.sparse_coo:
        return (
            left.is_coalesced() == right.is_coalesced()
            and torch.equal(left._indices(), right._indices())
            and same_bits(left._values(), right._values())
        )
    if left.is_complex():
        left, right = (torch.view_as_real(each.resolve_conj()) for each in (left, right))
    if left.is_floating_point() and not left.is_quantized:
        kind = _BITS[left.element_size()]
        left, right = (each.resolve_neg().view(kind) for each in (left, right))
    return torch.equal(left, right)


def _is_comparable(tensor: Tensor) -> bool:
    """Whether ``same_bits`` takes a tensor, and does not wait for a device."""
    layouts = (torch.strided, torch.sparse_coo)
    return tensor.device.type == "cpu" and tensor.layout in layouts and not tensor.is_nested


def _same_bytes(left: Any, right: Any) -> bool:
    """Return whether two NumPy arrays hold the same bytes, without copies if they lie in a row."""
    plain = type(left).__name__ == "ndarray"  # others may hide a part, as masked arrays do
    if not plain or left.dtype.hasobject or not left.flags.c_contiguous:
        return bool(left.tobytes() == right.tobytes())
    equal = sys.modules["numpy"].array_equal
    return bool(equal(*(each.reshape(-1).view("u1") for each in (left, right))))


def _every_element_once(tensor: Tensor) -> Tensor:
    """Return a view without the repetitions that ``expand`` makes."""
    if tensor.layout == torch.strided and not tensor.is_nested:
        for dim, stride in enumerate(tensor.stride()):
            if stride == 0 and tensor.shape[dim] > 1:
                tensor = tensor.narrow(dim, 0, 1)
    return tensor


def _is_same_memory(left: Tensor, right: Tensor) -> bool:
    if left.layout != torch.strided or right.layout != torch.strided or left.is_nested:
        return True
    return (left.data_ptr(), left.shape, left.stride()) == (
        right.data_ptr(),
        right.shape,
        right.stride(),
    )


def _version(tensor: Tensor) -> int:
    return 0 if tensor.is_inference() else tensor._version
