"""Gradient of the loss and Fisher-vector products: two engines that give one operator."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from trpo_optim.autograd_graph import (
    have_second_derivatives,
    now,
    reaches,
    require_attached,
)
from trpo_optim.closure import Objective, raised_by_torch
from trpo_optim.closure_checks import DETACHED, Values
from trpo_optim.report import TrustRegionError

__all__ = ["LocalModel", "first_order", "second_order"]

Product = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class LocalModel:
    """The closure near the current parameters.

    Attributes:
        loss: The closure's first value.
        kl: The closure's KL, in nats; about zero.
        kl_resolution: KLs closer than this cannot be told apart, in nats.
        gradient: ∇loss, shape (n,).
        product: v ↦ Fv, shape (n,), F the Hessian of the KL; undamped, symmetric and fixed.
        engine: The name of what differentiates.
    """

    loss: float
    kl: float
    kl_resolution: float
    gradient: Tensor
    product: Product
    engine: str


def first_order(objective: Objective) -> LocalModel:
    """Return the local model without curvature; one evaluation of the closure.

    Args:
        objective: The closure.

    Returns:
        A model whose ``product`` is not to be called.
    """
    parameters = objective.vector.parameters
    started = now()
    values = objective.with_graph()
    require_attached(values, parameters, started)
    gradient = _gradient(values.loss, parameters)
    return _model(objective, values, gradient, _no_product, "autograd")


def second_order(objective: Objective) -> LocalModel:
    """Return the local model; one evaluation of the closure wherever double backward can go.

    Double backward runs the same operations as the trials, whatever they are. What it refuses is
    handed to torch.func.

    Args:
        objective: The closure.

    Returns:
        The model, with the engine that made it.

    Raises:
        TrustRegionError: If neither engine can differentiate the closure.
        RuntimeError: Whatever the closure itself raises.
    """
    model = _by_double_backward(objective)
    if isinstance(model, LocalModel):
        return model
    refusal = model
    try:
        model = _by_torch_func(objective)
    except RuntimeError as error:
        if not raised_by_torch(error):
            raise
        model = str(error)
    if isinstance(model, LocalModel):
        return model
    raise TrustRegionError(
        "Neither engine can differentiate the closure twice.\n"
        f"double backward: {refusal}\ntorch.func: {model}\n"
        "Replace the operation that they name by one with second derivatives, or use "
        "mode='vanilla', which needs first derivatives alone."
    )


def _by_double_backward(objective: Objective) -> LocalModel | str:
    """Differentiate by backward through a retained backward, or return why that cannot be."""
    parameters = objective.vector.parameters
    started = now()
    values = objective.with_graph()
    require_attached(values, parameters, started)
    try:
        gradient = _gradient(values.loss, parameters, retain_graph=True)
        kl_gradient = _gradient(values.kl, parameters, create_graph=True)
    except RuntimeError as error:
        return str(error)
    if not have_second_derivatives(kl_gradient):
        return "compiled modules have no second derivatives"
    curved = [
        (index, piece)
        for index, piece in enumerate(kl_gradient)
        if piece is not None and piece.requires_grad
    ]

    def product(vector: Tensor) -> Tensor:
        pieces = objective.vector.scatter(vector)
        outputs = [piece for _, piece in curved]
        if not outputs:
            return torch.zeros_like(vector)
        return objective.vector.gather(
            torch.autograd.grad(
                outputs,
                parameters,
                [pieces[index] for index, _ in curved],
                retain_graph=True,
                allow_unused=True,
            )
        )

    return _model(objective, values, gradient, product, "double backward")


def _by_torch_func(objective: Objective) -> LocalModel | str:
    """Differentiate by vjp(grad), or return why that would not be the closure's derivative."""
    parameters = objective.vector.parameters
    if any(parameter._backward_hooks for parameter in parameters):
        return "it ignores the hooks on the parameters' gradients"
    twins = [parameter.detach() for parameter in parameters]
    attached = True

    def values_of(*inputs: Tensor) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
        nonlocal attached
        values = objective.at(*inputs)
        attached = values.loss.requires_grad and values.kl.requires_grad
        return (values.loss, values.kl), (values.loss, values.kl)

    def gradients(*inputs: Tensor) -> tuple[tuple[Tensor, ...], tuple[tuple[Tensor, ...], Any]]:
        (loss, kl), pull, pair = _vjp(values_of, *inputs)
        with torch.no_grad():
            loss_gradient = pull((torch.ones_like(loss), torch.zeros_like(kl)))
        kl_gradient = pull((torch.zeros_like(loss), torch.ones_like(kl)))
        have_second_derivatives(kl_gradient)
        return kl_gradient, (loss_gradient, pair)

    objective.rewind()
    started = now()
    with torch.enable_grad():
        _, pull, (loss_gradient, pair) = _vjp(gradients, *twins)
    values = Values(*pair)
    # The twins carry no graph of their own: what still has one has gone round them.
    if reaches((values.loss, values.kl), parameters, started):
        return "it does not reach some of the parameters"
    if not attached:
        raise TrustRegionError(DETACHED)
    if objective.drew_random_numbers():
        return "it may draw other random numbers, such as a dropout mask, than the trials"

    def product(vector: Tensor) -> Tensor:
        with torch.no_grad():
            return objective.vector.gather(pull(tuple(objective.vector.scatter(vector))))

    gradient = objective.vector.gather(loss_gradient)
    return _model(objective, values, gradient, product, "torch.func")


def _gradient(
    value: Tensor,
    parameters: tuple[Tensor, ...],
    *,
    retain_graph: bool = False,
    create_graph: bool = False,
) -> tuple[Tensor | None, ...]:
    with torch.enable_grad():
        return torch.autograd.grad(
            value,
            parameters,
            allow_unused=True,
            retain_graph=retain_graph or create_graph,
            create_graph=create_graph,
        )


def _vjp(function: Callable[..., Any], *inputs: Tensor) -> Any:
    """torch.func.vjp of a function that returns (value, aux): the value, the pullback, the aux."""
    return torch.func.vjp(function, *inputs, has_aux=True)


def _model(
    objective: Objective,
    values: Values,
    gradient: Tensor | tuple[Tensor | None, ...],
    product: Product,
    engine: str,
) -> LocalModel:
    """Assemble the model, with a product whose refusal is an error that names the engine."""

    def named_product(vector: Tensor) -> Tensor:
        try:
            return product(vector)
        except RuntimeError as error:
            raise TrustRegionError(
                f"The KL cannot be differentiated twice ({engine}): {error}\n"
                "Replace the operation that this names by one with second derivatives, or use "
                "mode='vanilla', which needs first derivatives alone."
            ) from error

    return LocalModel(
        loss=values.loss.item(),
        kl=values.kl.item(),
        kl_resolution=min(10 * torch.finfo(values.kl.dtype).eps, 1e-6),
        gradient=gradient if isinstance(gradient, Tensor) else objective.vector.gather(gradient),
        product=named_product,
        engine=engine,
    )


def _no_product(vector: Tensor) -> Tensor:
    raise NotImplementedError
