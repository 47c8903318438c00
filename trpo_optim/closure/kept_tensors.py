"""Tensors that a policy keeps of an evaluation: made plain once the step is over."""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from contextlib import suppress

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

    def make_plain(self, parameters: Sequence[Tensor]) -> None:
        """Turn what is still held into plain tensors of the same values, in place.

        Args:
            parameters: The optimizer's. A graph that does not reach them belongs to somebody else,
                and stays.
        """
        targets = set(map(id, parameters))
        for reference in self._made:
            tensor = reference()
            if tensor is None or id(tensor) in targets:
                continue
            if is_transformed(tensor):
                plain = untransformed(tensor)
            elif self._has_graph_of(targets, tensor):
                plain = tensor.detach()
            else:
                continue
            with suppress(RuntimeError):  # torch keeps a reference of its own to it
                swap_contents(tensor, plain)
        self._made.clear()

    def _has_graph_of(self, targets: set[int], tensor: Tensor) -> bool:
        """Whether an evaluation has made a tensor from parameters."""
        node = tensor.grad_fn
        if node is None or node._sequence_nr() < self._started:
            return False  # a function may return what it was given
        stack, seen = [node], set[object]()
        while stack:
            here = stack.pop()
            if here in seen:
                continue
            seen.add(here)
            if id(getattr(here, "variable", None)) in targets:
                return True
            stack.extend(child for child, _ in here.next_functions if child is not None)
        return False
