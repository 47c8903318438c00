"""Products by ``torch.func``: the vjp of the KL's gradient, from one evaluation."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from trpo_optim.closure.checks import DETACHED, Values
from trpo_optim.closure.dtensor import is_sharded
from trpo_optim.closure.evaluation import Objective
from trpo_optim.closure.interception import RefusedError
from trpo_optim.curvature.autograd_graph import now, reaches, require_kl_reaches
from trpo_optim.curvature.local_model import look_behind
from trpo_optim.errors import TrustRegionError
from trpo_optim.torch_private import transforms_undone

__all__ = ["ThirdValueError", "by_torch_func", "obstacle"]


class ThirdValueError(Exception):
    """The closure returns a third value, and so another engine is faster."""


def obstacle(parameters: Sequence[Tensor]) -> str:
    """Return why torch.func cannot serve closures of these parameters, or empty.

    Args:
        parameters: The optimizer's, as they are now.
    """
    return "some parameters are DTensors" if any(map(is_sharded, parameters)) else ""


def by_torch_func(
    objective: Objective, *, gradient: bool, without_third: bool = False
) -> tuple[Values, Tensor | None, Callable[[Tensor], Tensor]]:
    """Return a closure's values, the gradient of its loss, and v ↦ Fv; one evaluation.

    The closure becomes a function of stand-ins for the parameters. The product is
    ``torch.func.vjp`` of ``torch.func.grad`` of the KL: reverse over reverse, recorded once. The
    gradient of the loss is taken on the way, from the same graph.

    Args:
        objective: The closure.
        gradient: Whether the gradient of the loss is wanted.
        without_third: Whether a third value is ignored.

    Returns:
        The values without a graph, the gradient, shape (n,), or None, and the product.

    Raises:
        RefusedError: If torch.func cannot differentiate the closure, or would do so wrongly.
        ThirdValueError: If the closure returns a third value.
        TrustRegionError: If loss or KL does not depend on the parameters, or the loss on more than
            the KL.
        OutOfMemoryError: If there is no memory left.
    """
    vector = objective.vector
    count = len(vector.parameters)
    attached, in_closure = True, False

    def kl_of(*inputs: Tensor) -> Any:
        nonlocal attached, in_closure
        in_closure = True
        values = objective.at(*inputs)
        in_closure = False
        if values.third is not None and not without_third:
            raise ThirdValueError
        behind = look_behind(values.kl, objective)
        if behind.once_differentiable:
            raise RefusedError(f"{behind.once_differentiable} is marked once_differentiable")
        attached = values.kl.requires_grad and (values.loss.requires_grad or not gradient)
        slopes: tuple[Tensor, ...] = ()
        if gradient and attached:
            with torch.no_grad():
                slopes = torch.autograd.grad(
                    values.loss, inputs, retain_graph=True, materialize_grads=True
                )
                if not behind.leaves.issuperset(map(id, inputs)):
                    require_kl_reaches(slopes, behind.leaves, inputs, vector)
        largest = () if values.largest_kl is None else (values.largest_kl,)
        return values.kl, (slopes, (values.loss, values.kl, *largest))

    def kl_slopes_of(*inputs: Tensor) -> Any:
        differentiate = torch.func.grad(kl_of, argnums=tuple(range(count)), has_aux=True)
        return differentiate(*inputs)

    objective.rewind()
    started = now()
    twins = [parameter.detach() for parameter in vector.parameters]
    made: Any
    try:
        with torch.enable_grad(), transforms_undone():
            made = torch.func.vjp(kl_slopes_of, *twins, has_aux=True)
    except (RefusedError, ThirdValueError, TrustRegionError, torch.OutOfMemoryError):
        raise
    except Exception as error:
        if in_closure:
            raise
        raise RefusedError(str(error)) from error  # double backward tells what it is
    _, pull, (slopes, values) = made
    # The twins carry no graph of their own: what still has one has gone round them.
    if reaches(values, vector.parameters, started):
        raise RefusedError("it does not reach some of the parameters")
    if not attached:
        raise TrustRegionError(DETACHED)
    if objective.drew or objective.drew_random_numbers():
        raise RefusedError(
            "the closure draws random numbers, and torch.func may draw others than the trials do"
        )

    def product(direction: Tensor) -> Tensor:
        with torch.no_grad():
            return vector.gather(pull(tuple(vector.scatter(direction))))

    loss, kl, *largest = values
    found = Values(loss, kl, largest[0] if largest else None)
    return found, vector.gather(slopes) if gradient else None, product
