"""Tensors that a policy keeps of an evaluation: made plain once the step is over."""

from __future__ import annotations

import weakref
from collections.abc import Collection

from torch import Tensor

from trpo_optim.torch_private import (
    autograd_clock,
    is_transformed,
    swap_contents,
    untransformed,
)

__all__ = ["KeptTensors"]


class KeptTensors:
    """What the evaluations of a step have made, as far as somebody still holds it.

    A policy may keep a tensor of an evaluation, such as a recurrent state or a mask that it makes
    when it first needs one. Such a tensor carries the evaluation's graph, or is a wrapper of
    torch.func's. It can then be neither copied nor pickled.
    """

    def __init__(self) -> None:
        self._started = autograd_clock()
        self._made: list[weakref.ref[Tensor]] = []

    def add(self, tensor: Tensor) -> None:
        """Note a tensor that an evaluation has made.

        Args:
            tensor: It is not kept alive.
        """
        self._made.append(weakref.ref(tensor))

    def forget(self) -> None:
        """Drop the notes on tensors that nobody holds any more."""
        self._made = [each for each in self._made if each() is not None]

    def make_plain(self, without: Collection[int]) -> None:
        """Turn what is still held into plain tensors of the same values, in place.

        Args:
            without: The ids of tensors that are left alone.
        """
        for reference in self._made:
            tensor = reference()
            if tensor is None or id(tensor) in without:
                continue
            if is_transformed(tensor) or self._has_new_graph(tensor):
                swap_contents(tensor, untransformed(tensor).detach())
        self._made.clear()

    def _has_new_graph(self, tensor: Tensor) -> bool:
        """Whether the graph is an evaluation's: a function may return what it was given."""
        node = tensor.grad_fn
        return node is not None and node._sequence_nr() >= self._started
