"""Tensors that a policy keeps of an evaluation: made plain once the step is over."""

from __future__ import annotations

import weakref
from collections.abc import Iterator, Sequence
from contextlib import suppress

from torch import Tensor

from trpo_optim.torch_private import (
    autograd_clock,
    is_transformed,
    own_again,
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

    def count(self) -> int:
        """Return how many tensors were noted that may still be held."""
        return len(self._made)

    def holds(self, tensor: Tensor, since: int) -> bool:
        """Return whether a tensor was noted.

        Args:
            tensor: Any.
            since: What ``count`` said at the earliest.
        """
        return any(each is tensor for each in self._alive(since))

    def unwrap(self) -> None:
        """Take torch.func's wrappers off what is still held, before the next evaluation."""
        self._made = [reference for reference in self._made if reference() is not None]
        for tensor in self._alive():
            if is_transformed(tensor):
                _swap(tensor, untransformed(tensor))

    def any_with_graph(self, parameters: Sequence[Tensor]) -> bool:
        """Return whether somebody still holds a tensor with an evaluation's graph.

        Args:
            parameters: The optimizer's.
        """
        targets = set(map(id, parameters))
        return any(self._has_graph_of(targets, each) for each in self._alive())

    def make_plain(self, parameters: Sequence[Tensor]) -> None:
        """Turn what is still held into plain tensors of the same values, in place.

        Args:
            parameters: The optimizer's. A graph that does not reach them belongs to somebody else,
                and stays.
        """
        self.unwrap()
        targets = set(map(id, parameters))
        for tensor in self._alive():
            if id(tensor) not in targets and self._has_graph_of(targets, tensor):
                _swap(tensor, tensor.detach())
        self._made.clear()

    def _alive(self, since: int = 0) -> Iterator[Tensor]:
        """Yield what is still held."""
        for reference in self._made[since:]:
            if (tensor := reference()) is not None:
                own_again(tensor)
                yield tensor

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


def _swap(tensor: Tensor, plain: Tensor) -> None:
    """Give a tensor another's contents, unless torch keeps a reference of its own to it."""
    with suppress(RuntimeError):
        swap_contents(tensor, plain)
