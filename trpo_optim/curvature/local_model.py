"""Gradient of the loss and Fisher-vector products: three engines that give one operator."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from trpo_optim.closure.checks import DETACHED, Values
from trpo_optim.closure.evaluation import Objective, raised_by_torch
from trpo_optim.closure.parameters import ParameterVector
from trpo_optim.closure.torch_switches import remedy
from trpo_optim.curvature.autograd_graph import (
    have_second_derivatives,
    now,
    reaches,
    require_attached,
)
from trpo_optim.curvature.gauss_newton import gauss_newton
from trpo_optim.errors import TrustRegionError

__all__ = ["LocalModel", "first_order", "second_order"]

Product = Callable[[Tensor], Tensor]
"""v ↦ Fv for vectors of shape (n,)."""

_VANILLA = "Or use mode='vanilla', which needs first derivatives alone."

Made = tuple["Tensor | None", Product]
"""What an engine gives: the gradient of the loss, if it is wanted, and products."""


@dataclass(frozen=True)
class LocalModel:
    """The closure near the current parameters.

    Attributes:
        loss: The closure's first value.
        kl: The closure's KL, in nats; about zero.
        largest_kl: The largest KL of a sample, in nats; None where the closure gives the mean.
        kl_resolution: KLs closer than this cannot be told apart, in nats.
        gradient: ∇loss, shape (n,); empty where it was not asked for.
        product: v ↦ Fv, shape (n,), F the Hessian of the KL; undamped, symmetric and fixed.
        engine: The name of what differentiates.
        kls: The KL of every closure behind the model, by the closure's name; each about zero.
        fallback: Why the third value did not make the products Gauss–Newton, if it did not.
    """

    loss: float
    kl: float
    largest_kl: float | None
    kl_resolution: float
    gradient: Tensor
    product: Product
    engine: str
    kls: Mapping[str, float]
    fallback: str = ""

    def released(self) -> LocalModel:
        """Return the model without its products, and so without the graph that they hold."""
        return replace(self, product=_no_product)


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
    require_attached((values.loss, values.kl), parameters, started)
    gradient = _slope(values.loss, objective.vector)
    return _model(objective.name, values, (gradient, _no_product), "autograd")


def second_order(objective: Objective, *, gradient: bool = True) -> LocalModel:
    """Return the local model; one evaluation of the closure wherever plain autograd can go.

    With a third value, products are Gauss–Newton where that is the same operator. Otherwise double
    backward makes them: it runs the same operations as the trials, whatever they are. What it
    refuses is handed to torch.func.

    Args:
        objective: The closure.
        gradient: Whether the gradient of the loss is wanted too.

    Returns:
        The model, with the engine that made it.

    Raises:
        TrustRegionError: If no engine can differentiate the closure.
        RuntimeError: Whatever the closure itself raises.
    """
    vector = objective.vector
    started = now()
    values = objective.with_graph()
    loss = values.loss if gradient else None
    wanted = [values.kl] if loss is None else [loss, values.kl]
    require_attached(wanted, vector.parameters, started)
    fallback = ""
    if values.third is not None:
        made = gauss_newton(loss, values.kl, values.third, vector)
        if not isinstance(made, str):
            return _model(objective.name, values, made, "Gauss-Newton")
        fallback = made
    engine = "double backward"
    made = _by_double_backward(loss, values.kl, vector)
    if isinstance(made, str):
        refusal, engine = made, "torch.func"
        try:
            made = _by_torch_func(objective, gradient=gradient)
        except RuntimeError as error:
            if not raised_by_torch(error):
                raise
            made = str(error)
        if isinstance(made, str):
            raise TrustRegionError(
                "Neither engine can differentiate the closure twice. "
                f"{remedy(refusal)} {_VANILLA}\ndouble backward: {refusal}\ntorch.func: {made}"
            )
    return _model(objective.name, values, made, engine, fallback)


def _by_double_backward(loss: Tensor | None, kl: Tensor, vector: ParameterVector) -> Made | str:
    """Differentiate by backward through a retained backward, or return why that cannot be."""
    try:
        gradient = None if loss is None else _slope(loss, vector, retain_graph=True)
        kl_slope = _slope(kl, vector, create_graph=True)
    except RuntimeError as error:
        return str(error)
    if not have_second_derivatives([kl_slope]):
        return "compiled modules have no second derivatives"

    def product(direction: Tensor) -> Tensor:
        if not kl_slope.requires_grad:
            return torch.zeros_like(direction)
        return vector.gather(
            torch.autograd.grad(
                kl_slope, vector.parameters, direction, retain_graph=True, allow_unused=True
            )
        )

    return gradient, product


def _by_torch_func(objective: Objective, *, gradient: bool) -> Made | str:
    """Differentiate by vjp(grad), or return why that would not be the closure's derivative."""
    parameters = objective.vector.parameters
    if any(parameter._backward_hooks for parameter in parameters):
        return "it ignores the hooks on the parameters' gradients"
    twins = [parameter.detach() for parameter in parameters]
    attached = True

    def values_of(*inputs: Tensor) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
        nonlocal attached
        values = objective.at(*inputs)
        attached = values.kl.requires_grad and (values.loss.requires_grad or not gradient)
        return (values.loss, values.kl), (values.loss, values.kl)

    def slopes_of(*inputs: Tensor) -> tuple[tuple[Tensor, ...], tuple[Any, Any]]:
        (loss, kl), pull, pair = _vjp(values_of, *inputs)
        slopes = None
        if gradient:
            with torch.no_grad():
                slopes = pull((torch.ones_like(loss), torch.zeros_like(kl)))
        kl_slopes = pull((torch.zeros_like(loss), torch.ones_like(kl)))
        have_second_derivatives(kl_slopes)
        return kl_slopes, (slopes, pair)

    objective.rewind()
    started = now()
    with torch.enable_grad():
        _, pull, (slopes, pair) = _vjp(slopes_of, *twins)
    # The twins carry no graph of their own: what still has one has gone round them.
    if reaches(pair, parameters, started):
        return "it does not reach some of the parameters"
    if not attached:
        raise TrustRegionError(DETACHED)
    if objective.drew_random_numbers():
        return "it may draw other random numbers, such as a dropout mask, than the trials"

    def product(direction: Tensor) -> Tensor:
        with torch.no_grad():
            return objective.vector.gather(pull(tuple(objective.vector.scatter(direction))))

    return objective.vector.gather(slopes) if gradient else None, product


def _slope(
    value: Tensor,
    vector: ParameterVector,
    *,
    retain_graph: bool = False,
    create_graph: bool = False,
) -> Tensor:
    with torch.enable_grad():
        slopes = torch.autograd.grad(
            value,
            vector.parameters,
            allow_unused=True,
            retain_graph=retain_graph or create_graph,
            create_graph=create_graph,
        )
        return vector.gather(slopes)


def _vjp(function: Callable[..., Any], *inputs: Tensor) -> Any:
    """torch.func.vjp of a function that returns (value, aux): the value, the pullback, the aux."""
    return torch.func.vjp(function, *inputs, has_aux=True)


def _model(name: str, values: Values, made: Made, engine: str, fallback: str = "") -> LocalModel:
    """Assemble the model, with a product whose refusal is an error that names the engine."""
    gradient, product = made

    def named_product(direction: Tensor) -> Tensor:
        try:
            return product(direction)
        except RuntimeError as error:
            raise TrustRegionError(
                f"The KL cannot be differentiated twice. {remedy(str(error))} {_VANILLA}\n"
                f"{engine}: {error}"
            ) from error

    loss, kl, largest_kl = values.numbers()
    return LocalModel(
        loss=loss,
        kl=kl,
        largest_kl=largest_kl,
        kl_resolution=min(10 * torch.finfo(values.kl.dtype).eps, 1e-6),
        gradient=torch.empty(0) if gradient is None else gradient,
        product=named_product,
        engine=engine,
        kls={name: kl},
        fallback=fallback,
    )


def _no_product(vector: Tensor) -> Tensor:
    raise NotImplementedError
