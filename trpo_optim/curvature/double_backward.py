"""Derivatives by plain autograd: the gradient, and products by backward through a backward."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from trpo_optim.closure.parameters import ParameterVector
from trpo_optim.curvature.autograd_graph import have_second_derivatives

__all__ = ["by_double_backward", "gradient_of"]


def by_double_backward(
    loss: Tensor | None, kl: Tensor, vector: ParameterVector
) -> tuple[Tensor | None, Callable[[Tensor], Tensor]] | str:
    """Return the gradient of the loss and v ↦ Fv, or why torch refuses them.

    Args:
        loss: The closure's first value, with its graph; None where its gradient is not wanted.
        kl: Its KL, with its graph.
        vector: The parameters.

    Returns:
        The gradient, shape (n,), or None, and the product; or the refusal.

    Raises:
        OutOfMemoryError: If there is no memory left.
    """
    try:
        gradient = None if loss is None else gradient_of(loss, vector, retain_graph=True)
        kl_gradient = gradient_of(kl, vector, create_graph=True)
    except torch.OutOfMemoryError:
        raise
    except RuntimeError as error:
        return str(error)
    if not have_second_derivatives([kl_gradient]):
        return "compiled modules have no second derivatives"

    def product(direction: Tensor) -> Tensor:
        if not kl_gradient.requires_grad:
            return torch.zeros_like(direction)
        return vector.gather(
            torch.autograd.grad(
                kl_gradient, vector.parameters, direction, retain_graph=True, allow_unused=True
            )
        )

    return gradient, product


def gradient_of(
    value: Tensor,
    vector: ParameterVector,
    *,
    retain_graph: bool = False,
    create_graph: bool = False,
) -> Tensor:
    """Return the gradient of a scalar, shape (n,).

    Args:
        value: The scalar, with its graph.
        vector: The parameters.
        retain_graph: Whether the graph is kept.
        create_graph: Whether the gradient has a graph of its own.
    """
    with torch.enable_grad():
        slopes = torch.autograd.grad(
            value,
            vector.parameters,
            allow_unused=True,
            retain_graph=retain_graph or create_graph,
            create_graph=create_graph,
        )
        return vector.gather(slopes)
