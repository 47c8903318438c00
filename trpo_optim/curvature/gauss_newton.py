"""Gauss–Newton products Jᵀ M J v by two reverse passes; J is the outputs' Jacobian."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import get_gradient_edge

from trpo_optim.closure.parameters import ParameterVector
from trpo_optim.curvature.autograd_graph import have_second_derivatives, passes_by
from trpo_optim.curvature.graph_cut import find_cut, share_inner_edges
from trpo_optim.curvature.output_fisher import output_fisher

__all__ = ["gauss_newton"]


def gauss_newton(
    loss: Tensor | None, kl: Tensor, third: Any, vector: ParameterVector
) -> tuple[Tensor | None, Callable[[Tensor], Tensor]] | str:
    """Return the gradient of the loss and the product with the KL's Fisher matrix.

    J v is the derivative, in u, of the reverse pass u ↦ Jᵀu, whose graph is made once. Made at
    u = ∂loss/∂z, the same pass gives the gradient of a loss that depends on the parameters through
    z alone.

    Args:
        loss: The closure's first value, with its graph; None where its gradient is not wanted.
        kl: Its KL, with its graph.
        third: Its third value.
        vector: The parameters.

    Returns:
        The gradient, if wanted, and v ↦ Fv, for vectors of shape (n,); or why the third value does
        not serve. What torch refuses, it raises as a RuntimeError.
    """
    parameters = vector.parameters
    cut = find_cut(kl, third, parameters)
    if isinstance(cut, str):
        return cut
    inner = [each.inner for each in cut]
    outputs = output_fisher(kl, cut)
    if isinstance(outputs, str):
        return outputs
    slopes: Sequence[Tensor | None] = [None] * len(cut)
    whole: Sequence[Tensor | None] | None = None
    # Where inner edges are shared, the slope at one of them would count another's, too.
    if loss is not None and (share_inner_edges(cut) or passes_by(loss, inner, parameters)):
        whole = torch.autograd.grad(loss, parameters, retain_graph=True, allow_unused=True)
    elif loss is not None:
        slopes = torch.autograd.grad(loss, outputs.edges, retain_graph=True, allow_unused=True)
    cotangents = [
        (torch.zeros_like(like) if slope is None else slope.detach()).requires_grad_()
        for slope, like in zip(slopes, outputs.templates, strict=True)
    ]
    with torch.enable_grad():
        pulled = vector.joined(
            torch.autograd.grad(
                outputs.edges, parameters, cotangents, create_graph=True, allow_unused=True
            )
        )
    if not have_second_derivatives(pulled):
        return "compiled modules have no second derivatives"
    linear = {
        index: get_gradient_edge(each) for index, each in enumerate(pulled) if each.requires_grad
    }
    edges, fisher = outputs.edges, outputs.product
    owners = [each.owner for each in cut]

    def product(direction: Tensor, _kept: Any = owners) -> Tensor:  # as long as the product
        pieces = vector.split_as_joined(direction)
        tangents = torch.autograd.grad(
            list(linear.values()),
            cotangents,
            [pieces[index] for index in linear],
            retain_graph=True,
            materialize_grads=True,
        )
        return vector.gather(
            torch.autograd.grad(
                edges, parameters, fisher(tangents), retain_graph=True, allow_unused=True
            )
        )

    if loss is None:
        return None, product
    if whole is not None:
        return vector.gather(whole), product
    gradient = pulled[0] if len(pulled) == 1 else torch.cat(pulled)
    return gradient.detach(), product
