"""Products by backward through a backward, by plain autograd."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.autograd.graph import get_gradient_edge

from trpo_optim.closure.evaluation import Objective
from trpo_optim.curvature.autograd_graph import have_second_derivatives
from trpo_optim.curvature.first_derivatives import gradient_of

__all__ = ["by_double_backward"]


def by_double_backward(
    loss: Tensor | None, kl: Tensor, objective: Objective
) -> tuple[Tensor | None, Callable[[Tensor], Tensor]] | str:
    """Return the gradient of the loss and v ↦ Fv, or why they cannot be made.

    Args:
        loss: The closure's first value, with its graph; None where its gradient is not wanted.
        kl: Its KL, with its graph.
        objective: The closure.

    Returns:
        The gradient, shape (n,), or None, and the product; or the reason. What torch refuses, it
        raises as a RuntimeError.
    """
    vector = objective.vector
    gradient = None if loss is None else gradient_of(loss, objective, retain_graph=True)
    with torch.enable_grad():
        slopes = vector.joined(
            torch.autograd.grad(kl, vector.parameters, allow_unused=True, create_graph=True)
        )
    if not have_second_derivatives(slopes):
        return "compiled modules have no second derivatives"
    curved = {i: get_gradient_edge(each) for i, each in enumerate(slopes) if each.requires_grad}

    def product(direction: Tensor) -> Tensor:
        if not curved:
            return torch.zeros_like(direction)
        pieces = vector.split_as_joined(direction)
        return vector.gather(
            torch.autograd.grad(
                list(curved.values()),
                vector.parameters,
                [pieces[index] for index in curved],
                retain_graph=True,
                allow_unused=True,
            )
        )

    return gradient, product
