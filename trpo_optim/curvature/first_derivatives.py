"""Gradients by plain autograd, and by ``backward()`` where torch allows nothing else."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from trpo_optim.closure.checks import DETACHED
from trpo_optim.closure.evaluation import Objective
from trpo_optim.closure.parameters import ParameterVector
from trpo_optim.closure.transaction import HIDDEN
from trpo_optim.curvature.autograd_graph import calls_python, graph_leaves
from trpo_optim.errors import TrustRegionError

__all__ = ["gradient_of", "reached_by_backward", "require_differentiable"]


def gradient_of(
    value: Tensor,
    objective: Objective,
    *,
    retain_graph: bool = False,
    may_refuse: bool | None = None,
) -> Tensor:
    """Return the gradient of a scalar, shape (n,).

    If ``backward()`` adds up the gradients of all ranks, it is the weighted sum over the closures
    of all ranks. Each rank gets its own part of the sum.

    Args:
        value: The scalar, with its graph, which ``require_differentiable`` has checked.
        objective: The closure that made it.
        retain_graph: Whether the graph is kept.
        may_refuse: Whether an ``autograd.Function`` lies behind the value. None: look.

    Raises:
        OutOfMemoryError: If there is no memory left.
        RuntimeError: If torch cannot differentiate the value.
        TrustRegionError: If the value does not depend on the parameters.
    """
    vector = objective.vector
    if objective.share is not None:
        return _by_backward(value, objective, retain_graph=retain_graph)
    if may_refuse is None:
        may_refuse = calls_python(value)
    try:
        with objective.kernels():
            slopes = torch.autograd.grad(
                value, vector.parameters, allow_unused=True, retain_graph=retain_graph or may_refuse
            )
    except torch.OutOfMemoryError:
        raise
    except RuntimeError:
        if not may_refuse:
            raise
        # A reentrant checkpoint calls backward() in its own, and knows of parameters that the
        # graph does not show.
        return _by_backward(value, objective, retain_graph=retain_graph)
    called = any(parameter.grad is not None for parameter in vector.parameters)
    if may_refuse and (called or any(each is None for each in slopes)):  # some may be hidden
        return _by_backward(value, objective, retain_graph=retain_graph)
    return vector.gather(slopes)


def _by_backward(value: Tensor, objective: Objective, *, retain_graph: bool) -> Tensor:
    vector, share = objective.vector, objective.share
    with _hidden([*graph_leaves(value), *vector.parameters, *objective.other_leaves()]):
        with objective.kernels():
            value.backward(None if share is None else value.new_tensor(share), retain_graph)
        slopes = [parameter.grad for parameter in vector.parameters]
    if all(each is None for each in slopes):
        raise TrustRegionError(DETACHED)
    return vector.gather(slopes if vector.fsdp is None else vector.fsdp.summed(slopes))


def reached_by_backward(value: Tensor, objective: Objective) -> frozenset[int]:
    """Return the ``id`` of every parameter that a value depends on, hidden ones too.

    Args:
        value: The scalar, with its graph, which is kept.
        objective: The closure that made it. Where ranks add up its gradients, or torch cannot
            differentiate the value here, all parameters count.

    Raises:
        OutOfMemoryError: If there is no memory left.
    """
    leaves = objective.vector.leaves
    if objective.share is None:
        with _hidden([*graph_leaves(value), *leaves, *objective.other_leaves()]):
            try:
                with objective.kernels():
                    value.backward(retain_graph=True)
            except torch.OutOfMemoryError:
                raise
            except RuntimeError:
                pass
            else:
                leaves = tuple(each for each in leaves if each.grad is not None)
    return frozenset(map(id, leaves))


def require_differentiable(value: Tensor, vector: ParameterVector) -> None:
    """Check that a scalar has a gradient. In FSDP, every rank checks before any calls backward().

    Args:
        value: The scalar.
        vector: The parameters.

    Raises:
        TrustRegionError: If it has none, or FSDP does not see a part of it.
    """
    if not value.requires_grad:
        raise TrustRegionError(DETACHED)
    if vector.fsdp:
        leaves = list(graph_leaves(value))
        _require_gathered_by_fsdp(leaves, vector.parameters)
        shown = not set(map(id, leaves)).isdisjoint(map(id, vector.leaves))
        if not (shown or calls_python(value)):
            raise TrustRegionError(DETACHED)


def _require_gathered_by_fsdp(leaves: Iterable[Tensor], parameters: Iterable[Tensor]) -> None:
    """Check that a closure takes no sharded parameter itself: FSDP does not see that gradient."""
    own = set(map(id, parameters))
    used = [tuple(each.shape) for each in leaves if id(each) in own]
    if used:
        raise TrustRegionError(
            f"The closure uses a parameter of shape {used[0]} that FSDP has sharded, outside of "
            "its module, where FSDP does not add up its gradient over the ranks. Use the parameter "
            "in the forward() of the module that fully_shard got, and return what depends on it."
        )


@contextmanager
def _hidden(leaves: list[Tensor]) -> Iterator[None]:
    """Take gradients and hooks off some leaves, and put them back."""
    before = [(leaf, name, getattr(leaf, name)) for leaf in leaves for name in HIDDEN]
    try:
        for leaf, name, _ in before:
            setattr(leaf, name, None)
        yield
    finally:
        for leaf, name, value in before:
            setattr(leaf, name, value)
