"""Arrays and tensors that share memory, while an environment's state is kept."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from trpo_optim.snapshots.simulators import Array

__all__ = ["Storages", "TensorView", "View", "is_plain", "other_form"]

Storages = dict[tuple[int, int], tuple[Array, Any]]
"""Memory by its address and its size."""


@dataclass(frozen=True, eq=False)
class View:
    """A view of an array while it is kept, since pickled arrays do not share memory."""

    base: Any
    shape: tuple[int, ...]
    dtype: np.dtype[Any]
    start: int
    strides: tuple[int, ...]


@dataclass(frozen=True, eq=False)
class TensorView:
    """A tensor while it is kept: several may share memory, and pickled ones do not."""

    base: Array
    dtype: torch.dtype
    size: tuple[int, ...]
    stride: tuple[int, ...]
    offset: int
    requires_grad: bool

    @classmethod
    def of(cls, tensor: torch.Tensor, storages: Storages) -> TensorView:
        """Keep a tensor; those of one memory keep one copy of that.

        Args:
            tensor: On the CPU, and strided.
            storages: The memory that is kept: its bytes, and the storage itself.

        Returns:
            What is kept.
        """
        storage = tensor.untyped_storage()
        key = storage.data_ptr(), storage.nbytes()
        if key not in storages:
            content = torch.empty(0, dtype=torch.uint8, device="cpu").set_(storage).numpy().copy()
            storages[key] = (content, storage)
        base, _ = storages[key]
        size, stride, offset = tuple(tensor.shape), tensor.stride(), int(tensor.storage_offset())
        return cls(
            base, tensor.dtype, size, stride, offset, tensor.requires_grad and tensor.is_leaf
        )

    def on(self, base: Array) -> torch.Tensor:
        """Return the tensor again, in other memory."""
        storage = torch.from_numpy(base).untyped_storage()
        tensor = torch.empty(0, dtype=self.dtype, device="cpu").set_(
            storage, self.offset, self.size, self.stride
        )
        return tensor.requires_grad_(self.requires_grad)


def is_plain(tensor: torch.Tensor) -> bool:
    """Return whether a tensor is kept with its whole memory, which is not much larger than it."""
    plain = tensor.device.type == "cpu" and tensor.layout == torch.strided and not tensor.is_nested
    if not plain or tensor.is_quantized or tensor.is_conj() or tensor.is_neg():
        return False
    return tensor.untyped_storage().nbytes() <= 4096 + 16 * tensor.numel() * tensor.element_size()


def other_form(array: Any, base: Array) -> Any:
    """Return a view as it is kept, or one that was kept as an array again, on a copied base."""
    if isinstance(array, View):
        return np.ndarray(array.shape, array.dtype, base, array.start, array.strides)
    start = array.ctypes.data - array.base.ctypes.data
    return View(base, array.shape, array.dtype, start, array.strides)
