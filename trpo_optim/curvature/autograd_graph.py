"""What the autograd graph behind a value reaches, and what it must not pass through."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Sequence, Set
from dataclasses import dataclass
from typing import Any

from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import BackwardCFunction, once_differentiable
from torch.autograd.graph import get_gradient_edge

from trpo_optim.closure.checks import DETACHED
from trpo_optim.closure.parameters import ParameterVector
from trpo_optim.errors import TrustRegionError
from trpo_optim.torch_private import autograd_clock

__all__ = [
    "Edge",
    "GraphSummary",
    "below",
    "calls_python",
    "edge_of",
    "graph_leaves",
    "have_second_derivatives",
    "meets",
    "now",
    "passes_by",
    "reaches",
    "require_attached",
    "require_kl_reaches",
    "summary",
]

_mark: Any = once_differentiable
_ONCE_DIFFERENTIABLE = _mark(lambda: None).__code__
"""What all functions with the mark share."""

_WITHOUT_SECOND_DERIVATIVES = {"CompiledFunctionBackward", "torch::autograd::Error"}

_DEAR = {
    "convolutions": ({"ConvolutionBackward0"},),
    "attention": (
        {"BmmBackward0", "BaddbmmBackward0"},
        {"SoftmaxBackward0", "SafeSoftmaxBackward0"},
    ),
}
"""What second derivatives are dear through: of each of these sets, the graph holds a node."""

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
    return autograd_clock()


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
                    "before it ran, such as the old log-probabilities or the old distribution, or "
                    "in another thread. Compute old values under torch.no_grad(), or detach() "
                    "them. Compute new values in the thread that calls step()."
                )
            found = True
    return found


def require_attached(values: Iterable[Tensor], parameters: Sequence[Tensor], started: int) -> bool:
    """Check that loss and KL each depend on the parameters, as far as the graph shows.

    Args:
        values: What the closure returned.
        parameters: The parameters to look for.
        started: What ``now`` said before the closure ran.

    Returns:
        Whether the graph shows it. If not, an ``autograd.Function`` may hide the parameters.

    Raises:
        TrustRegionError: If one does not, or does so through the old policy.
    """
    shown = True
    for value in values:
        if not reaches([value], parameters, started):
            shown = False
            if not calls_python(value):
                raise TrustRegionError(DETACHED)
    return shown


@dataclass(frozen=True)
class GraphSummary:
    """What lies behind a value.

    Attributes:
        leaves: The ``id`` of every tensor that it is made from and that requires a gradient itself.
        once_differentiable: The name of an ``autograd.Function`` that forbids second derivatives,
            or empty. Torch raises no error there: it takes the second derivative for zero.
        calls_python: Whether there is an ``autograd.Function``. Its backward may reach parameters
            that the graph does not show, as a reentrant checkpoint does.
        dear: What makes second derivatives dear, or empty.
    """

    leaves: frozenset[int]
    once_differentiable: str
    calls_python: bool
    dear: str


def summary(value: Tensor) -> GraphSummary:
    """Return what lies behind a value.

    Args:
        value: With its graph, plain or of a transform of torch.func's.
    """
    leaves, once, python, names = set[int](), "", False, set[str]()
    for node, _ in _nodes([value]):
        names.add(node.name())
        if isinstance(variable := getattr(node, "variable", None), Tensor):
            leaves.add(id(variable))
        elif _is_python(node):
            python = True
            function = _function_of(node)
            if getattr(function.backward, "__code__", None) is _ONCE_DIFFERENTIABLE:
                once = str(function.__name__)
    held = (name for name, sets in _DEAR.items() if not any(map(names.isdisjoint, sets)))
    return GraphSummary(frozenset(leaves), once, python, next(held, ""))


def calls_python(value: Tensor) -> bool:
    """Return whether an ``autograd.Function`` lies behind a value.

    Args:
        value: With its graph.
    """
    return any(_is_python(node) for node, _ in _nodes([value]))


def require_kl_reaches(
    slopes: Sequence[Tensor | None],
    reached: Collection[int],
    leaves: Sequence[Tensor],
    vector: ParameterVector,
) -> None:
    """Check that the KL depends on every parameter along which the loss has a slope.

    Where it does not, the Fisher matrix is zero. The damping alone then gives the length of the
    step there, and the KL says nothing of it.

    Args:
        slopes: The gradient of the loss, in the parameters' order.
        reached: The ``id`` of every parameter that the KL depends on.
        leaves: The parameters as the graph knows them.
        vector: The parameters.

    Raises:
        TrustRegionError: If it does not; the parameters are named.
    """
    missed = [
        f"{name} (shape {tuple(leaf.shape)})"
        for name, leaf, slope in zip(vector.names, leaves, slopes, strict=True)
        if id(leaf) not in reached and slope is not None and bool(slope.any())
    ]
    if missed:
        more = f" and {len(missed) - 5} more" if len(missed) > 5 else ""
        raise TrustRegionError(
            "The loss depends on parameters that the KL does not depend on: "
            f"{', '.join(missed[:5])}{more}{vector.counting}. No trust region holds these. Leave "
            "the value loss out of the closure, and train the critic with its own optimizer."
        )


def _is_python(node: Any) -> bool:
    """Whether an ``autograd.Function`` made a node, other than FSDP's, which hide nothing."""
    if not isinstance(node, BackwardCFunction):
        return False
    module = str(getattr(_function_of(node), "__module__", ""))
    return not module.startswith("torch.distributed.fsdp")


def _function_of(node: Any) -> Any:
    """Return the ``autograd.Function`` that made a node, or None."""
    function = getattr(node, "_forward_cls", None)
    for cell in getattr(getattr(function, "backward", None), "__closure__", None) or ():
        if isinstance(inner := cell.cell_contents, type) and issubclass(inner, Function):
            return inner  # torch.func wraps the user's function in one of its own
    return function


def have_second_derivatives(gradient: Iterable[Tensor | None]) -> bool:
    """Return whether backward can go through a gradient.

    Args:
        gradient: The gradient, with its graph.

    Returns:
        False where a compiled module lies behind it, or what torch marks as an error.
    """
    names = {node.name() for node, _ in _nodes(each for each in gradient if each is not None)}
    return names.isdisjoint(_WITHOUT_SECOND_DERIVATIVES)


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
