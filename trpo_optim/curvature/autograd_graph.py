"""What the autograd graph behind a value reaches, and what it must not pass through."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence, Set
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import get_gradient_edge

from trpo_optim.closure.checks import DETACHED
from trpo_optim.errors import TrustRegionError

__all__ = [
    "Edge",
    "below",
    "edge_of",
    "graph_leaves",
    "have_second_derivatives",
    "meets",
    "now",
    "passes_by",
    "reaches",
    "require_attached",
]

Edge = tuple[Any, int]
"""A tensor's place in the graph: the node that made it, and which of its outputs it is."""


def edge_of(tensor: Tensor) -> Edge:
    """Return the place of a tensor that requires a gradient."""
    edge = get_gradient_edge(tensor)
    return edge.node, edge.output_nr


def below(edge: Edge) -> list[Edge]:
    """Return the places of what a tensor was made from, towards the parameters."""
    return [child for child in edge[0].next_functions if child[0] is not None]


def meets(starts: Iterable[Edge], targets: Set[Edge]) -> bool:
    """Return whether any of some places is, or is made from, any of some others.

    Args:
        starts: Where to begin, towards the parameters.
        targets: What to look for.
    """
    return any(edge in targets for edge in _places(starts))


def passes_by(value: Tensor, stops: Iterable[Edge], parameters: Iterable[Tensor]) -> bool:
    """Return whether a value depends on a parameter other than through given places.

    Args:
        value: With its graph.
        stops: Where no way is followed further.
        parameters: The parameters to look for.
    """
    leaves = set(map(id, parameters))
    places = _places([edge_of(value)], stops)
    return any(id(getattr(node, "variable", None)) in leaves for node, _ in places)


def graph_leaves(value: Tensor) -> Iterator[Tensor]:
    """Yield the tensors that a value is made from and that require gradients themselves."""
    if value.requires_grad:
        for node, _ in _places([edge_of(value)]):
            if isinstance(variable := getattr(node, "variable", None), Tensor):
                yield variable


def _places(starts: Iterable[Edge], stops: Iterable[Edge] = ()) -> Iterator[Edge]:
    """Yield some places and all below them, without the stops and what lies below these alone."""
    stack, seen = list(starts), set(stops)
    while stack:
        edge = stack.pop()
        if edge not in seen:
            seen.add(edge)
            yield edge
            stack.extend(below(edge))


def now() -> int:
    """Return a number that autograd nodes created from here on do not fall below."""
    return torch._C._autograd._get_sequence_nr()


def reaches(values: Iterable[Tensor], parameters: Sequence[Tensor], started: int) -> bool:
    """Return whether the graph behind some values reaches a parameter.

    Args:
        values: What the closure returned.
        parameters: The parameters to look for.
        started: What ``now`` said before the closure ran.

    Returns:
        Whether it does.

    Raises:
        TrustRegionError: If it does so through a graph that was made before the closure ran: the
            old policy was not detached, and its gradient would be taken for the new one's.
    """
    targets = set(map(id, parameters))
    found = False
    for node, earlier in _nodes(values, started):
        if id(getattr(node, "variable", None)) in targets:
            if earlier:
                raise TrustRegionError(
                    "The closure depends on the parameters through a tensor that was computed "
                    "before it ran, such as the old log-probabilities or the old distribution. "
                    "Compute these under torch.no_grad(), or detach() them."
                )
            found = True
    return found


def require_attached(values: Iterable[Tensor], parameters: Sequence[Tensor], started: int) -> None:
    """Check that loss and KL each depend on the parameters.

    Args:
        values: What the closure returned.
        parameters: The parameters to look for.
        started: What ``now`` said before the closure ran.

    Raises:
        TrustRegionError: If one does not, or does so through the old policy.
    """
    for value in values:
        if not reaches([value], parameters, started):
            raise TrustRegionError(DETACHED)


def have_second_derivatives(gradient: Iterable[Tensor | None]) -> bool:
    """Return whether backward can go through a gradient.

    Args:
        gradient: The gradient, with its graph.

    Returns:
        False where a compiled module lies behind it.

    Raises:
        TrustRegionError: If an autograd.Function marked ``once_differentiable`` does. Torch marks
            these by a node that raises when backward passes it, but backward to given inputs goes
            round it and takes the second derivative for zero.
    """
    names = {node.name() for node, _ in _nodes(each for each in gradient if each is not None)}
    if "torch::autograd::Error" in names:
        raise TrustRegionError(
            "The KL passes through an autograd.Function whose backward is marked "
            "once_differentiable, so it has no second derivatives. Write its backward with "
            "differentiable torch operations and drop the mark, or use mode='vanilla'."
        )
    return "CompiledFunctionBackward" not in names


def _nodes(tensors: Iterable[Tensor], started: int = 0) -> Iterator[tuple[Any, bool]]:
    """Yield each node behind some tensors, and whether the way to it is older than ``started``."""
    stack: list[tuple[Any, bool]] = [
        (get_gradient_edge(tensor).node, False) for tensor in tensors if tensor.requires_grad
    ]
    seen: set[tuple[Any, bool]] = set()
    while stack:
        node, earlier = stack.pop()
        earlier = earlier or node._sequence_nr() < started
        if (node, earlier) in seen:
            continue
        seen.add((node, earlier))
        yield node, earlier
        stack.extend((child, earlier) for child, _ in node.next_functions if child is not None)
