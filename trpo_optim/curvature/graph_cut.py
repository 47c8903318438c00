"""Where the closure's third value cuts the graph between the network and the KL."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence, Set
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import BackwardCFunction
from torch.distributions import Categorical, Distribution

from trpo_optim.curvature.autograd_graph import Edge, below, edge_of, meets

__all__ = ["Crossing", "find_cut", "share_inner_edges"]


@dataclass(frozen=True)
class _Mark:
    """What is known of a tensor of the third value."""

    tensor: Tensor
    normalised: bool = False  # log-probabilities


@dataclass(frozen=True)
class Crossing:
    """A place where the way from the KL to the parameters is cut.

    The KL is differentiated with respect to ``outer``; the network is followed from ``inner``.
    These differ where the KL is not smooth in ``inner``, or not stationary in ``outer``.

    Attributes:
        outer: An edge of the graph.
        inner: The same, or the one below it.
        sign: The slope of ``outer`` in ``inner``, where it is an absolute value; else None.
        log_probabilities: The value of ``outer``, where that is what it is; else None.
        dim: The dimension over which their probabilities sum to one.
        owner: What keeps the node of ``inner`` alive where only a tensor or a later node does: that
            of an ``autograd.Function``. Else None.
    """

    outer: Edge
    inner: Edge
    sign: Tensor | None = None
    log_probabilities: Tensor | None = None
    dim: int = -1
    owner: Any = None


def find_cut(kl: Tensor, third: Any, parameters: Iterable[Tensor]) -> list[Crossing] | str:
    """Cut every way from the KL to the parameters, at the third value or above it.

    Log-probabilities are cut below their normalisation, where it can be seen, and absolute values
    at zero (a Laplace's) are crossed as the even functions that they stand in.

    Args:
        kl: The closure's KL, with its graph.
        third: The closure's third value: a distribution, a tensor, or a tuple or dict of these.
        parameters: The optimizer's parameters.

    Returns:
        The crossings, no outer edge of which depends on another's, or why there are none.
    """
    marks = dict(_marks(third))
    leaves = set(map(id, parameters))
    opened: set[Edge] = set()
    while True:
        crossings = _crossings(kl, marks, opened, leaves)
        if isinstance(crossings, str):
            return crossings
        nested = _nested(crossings)
        if not nested:
            return crossings
        opened |= nested


def _marks(value: Any) -> Iterator[tuple[Edge, _Mark]]:
    """Yield the tensors of a third value that the KL may depend on."""
    if isinstance(value, Tensor):
        if value.requires_grad:
            yield edge_of(value), _Mark(value)
    elif isinstance(value, Distribution):
        for name, each in vars(value).items():
            if isinstance(each, Tensor) and each.requires_grad:
                normalised = name == "logits" and isinstance(value, Categorical)
                yield edge_of(each), _Mark(each, normalised)
            elif isinstance(each, Distribution | tuple | list):
                yield from _marks(each)
    elif isinstance(value, tuple | list | Mapping):
        for each in value.values() if isinstance(value, Mapping) else value:
            yield from _marks(each)


def _crossings(
    kl: Tensor, marks: Mapping[Edge, _Mark], opened: Set[Edge], leaves: Set[int]
) -> list[Crossing] | str:
    """Return where the ways down from the KL are cut, or which way passes all marks."""
    found = []
    stack, seen = [edge_of(kl)], set()
    while stack:
        edge = stack.pop()
        if edge in seen:
            continue
        seen.add(edge)
        crossing = None if edge in opened else _crossing(edge, marks)
        if crossing is not None:
            found.append(crossing)
        elif id(getattr(edge[0], "variable", None)) in leaves:
            return (
                "the KL depends on a parameter other than through the third value; return the "
                "very tensors or the distribution that the KL was computed from"
            )
        else:
            stack.extend(below(edge))
    return found


def _crossing(edge: Edge, marks: Mapping[Edge, _Mark]) -> Crossing | None:
    mark = marks.get(edge)
    node = edge[0]
    kind = node.name()
    if kind == "LogSoftmaxBackward0":
        inner = below(edge)[0]
        return Crossing(
            edge,
            inner,
            log_probabilities=node._saved_result.detach(),
            dim=_signed(node._saved_dim),
            owner=_owner(inner, node),
        )
    if kind == "SubBackward0" and (normaliser := _normaliser(edge)) is not None:
        inner = below(edge)[0]
        raw, total = normaliser._saved_self.detach(), normaliser._saved_result.detach()
        return Crossing(
            edge,
            inner,
            log_probabilities=raw - total,
            dim=_signed(normaliser._saved_dim[0]),
            owner=_owner(inner, node),
        )
    if mark is not None:
        return Crossing(
            edge,
            edge,
            log_probabilities=mark.tensor.detach() if mark.normalised else None,
            owner=_owner(edge, mark.tensor),
        )
    if kind == "AbsBackward0":
        inner, inside = below(edge)[0], node._saved_self.detach()
        if bool((inside == 0).any()):
            sign = torch.where(inside < 0, -1.0, 1.0).to(inside.dtype)
            return Crossing(edge, inner, sign=sign, owner=_owner(inner, node))
    return None


def _owner(edge: Edge, owner: Any) -> Any:
    return owner if isinstance(edge[0], BackwardCFunction) else None


def _normaliser(edge: Edge) -> Any:
    """Return the logsumexp node of x − logsumexp(x), or None where a difference is another."""
    children = below(edge)
    if len(children) != 2 or edge[0]._saved_alpha != 1:
        return None
    node = children[1][0]
    if node.name() != "LogsumexpBackward0" or below(children[1]) != children[:1]:
        return None
    return node if node._saved_keepdim and len(node._saved_dim) == 1 else None


def _signed(dim: int) -> int:
    """Return a dimension that autograd keeps as an unsigned number."""
    return dim - 2**64 if dim >= 2**63 else dim


def _nested(crossings: Sequence[Crossing]) -> set[Edge]:
    """Return the outer edges of crossings that themselves depend on another one."""
    outer = {each.outer for each in crossings}

    def starts(crossing: Crossing) -> list[Edge]:
        own = crossing.inner == crossing.outer
        return below(crossing.inner) if own else [crossing.inner]

    if len(crossings) < 2 or not meets([e for each in crossings for e in starts(each)], outer):
        return set()
    return {each.outer for each in crossings if meets(starts(each), outer)}


def share_inner_edges(crossings: Sequence[Crossing]) -> bool:
    """Return whether what lies below one crossing goes through, or is, what lies below another.

    Args:
        crossings: A cut.
    """
    inner = {each.inner for each in crossings}
    if len(inner) < len(crossings):
        return True
    return len(inner) > 1 and meets([e for each in inner for e in below(each)], inner)
