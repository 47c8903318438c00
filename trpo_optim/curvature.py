"""Gradient of the loss and Fisher-vector products: two engines that give one operator."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from trpo_optim.closure import Objective, raised_by_torch
from trpo_optim.closure_checks import Values, detached_error
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
    started = _now()
    values = objective.with_graph()
    _require_attached(objective, values, started)
    gradient = _gradient(values.loss, objective.vector.parameters)
    return _model(objective, values, gradient, _no_product, "autograd")


def second_order(objective: Objective) -> LocalModel:
    """Return the local model; one evaluation of the closure where torch.func can go.

    Where torch.func refuses the closure (batch norm in training mode, checkpointing, an
    autograd.Function without setup_context), double backward takes it instead.

    Args:
        objective: The closure.

    Returns:
        The model, with the engine that made it.

    Raises:
        TrustRegionError: If neither engine can differentiate the closure.
        RuntimeError: Whatever the closure itself raises.
    """
    try:
        model = _by_torch_func(objective)
    except RuntimeError as error:
        if not raised_by_torch(error):
            raise
        refusal = str(error)
    else:
        if model is not None:
            return model
        refusal = "it does not reach some of the parameters"
    try:
        return _by_double_backward(objective)
    except RuntimeError as error:
        if not raised_by_torch(error) or str(error) == refusal:
            raise
        raise TrustRegionError(
            "Neither engine can differentiate the closure twice.\n"
            f"torch.func: {refusal}\ndouble backward: {error}\n"
            "Replace the operation that they name by one with second derivatives, or use "
            "mode='vanilla', which needs first derivatives alone."
        ) from error


def _by_torch_func(objective: Objective) -> LocalModel | None:
    """Differentiate by vjp(grad), or return None where it misses a parameter."""
    twins = [parameter.detach() for parameter in objective.vector.parameters]
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
        _require_second_derivatives(kl_gradient)
        return kl_gradient, (loss_gradient, pair)

    objective.rewind()
    started = _now()
    with torch.enable_grad():
        _, pull, (loss_gradient, pair) = _vjp(gradients, *twins)
    values = Values(*pair)
    # The twins carry no graph of their own: what still has one has gone round them.
    if _reaches(objective, values, started):
        return None
    if not attached:
        raise detached_error()

    def product(vector: Tensor) -> Tensor:
        with torch.no_grad():
            return objective.vector.gather(pull(tuple(objective.vector.scatter(vector))))

    gradient = objective.vector.gather(loss_gradient)
    return _model(objective, values, gradient, product, "torch.func")


def _by_double_backward(objective: Objective) -> LocalModel:
    """Differentiate by backward through a retained backward."""
    parameters = objective.vector.parameters
    started = _now()
    values = objective.with_graph()
    _require_attached(objective, values, started)
    gradient = _gradient(values.loss, parameters, retain_graph=True)
    kl_gradient = _gradient(values.kl, parameters, create_graph=True)
    _require_second_derivatives(kl_gradient)
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
        kl_resolution=10 * torch.finfo(values.kl.dtype).eps,
        gradient=gradient if isinstance(gradient, Tensor) else objective.vector.gather(gradient),
        product=named_product,
        engine=engine,
    )


def _no_product(vector: Tensor) -> Tensor:
    raise NotImplementedError


def _require_attached(objective: Objective, values: Values, started: int) -> None:
    if not all(
        value.requires_grad and _reaches(objective, Values(value, value), started)
        for value in (values.loss, values.kl)
    ):
        raise detached_error()


def _require_second_derivatives(kl_gradient: Iterable[Tensor | None]) -> None:
    """Check that no autograd.Function marked ``once_differentiable`` lies behind the KL's gradient.

    Torch marks these by a node that raises when backward passes it, but backward to given inputs
    goes round it and takes the second derivative for zero.

    Args:
        kl_gradient: The gradient of the KL, with its graph.

    Raises:
        TrustRegionError: If there is one.
    """
    stack = [piece.grad_fn for piece in kl_gradient if piece is not None]
    seen: set[Any] = set()
    while stack:
        node = stack.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        if node.name() == "torch::autograd::Error":
            raise TrustRegionError(
                "The KL passes through an autograd.Function whose backward is marked "
                "once_differentiable, so it has no second derivatives. Write its backward with "
                "differentiable torch operations and drop the mark, or use mode='vanilla'."
            )
        stack.extend(child for child, _ in node.next_functions)


def _now() -> int:
    """Return a number that autograd nodes created from here on do not fall below."""
    return torch._C._autograd._get_sequence_nr()


def _reaches(objective: Objective, values: Values, started: int) -> bool:
    """Return whether the values' plain autograd graph reaches a parameter.

    Returns:
        Whether it does.

    Raises:
        TrustRegionError: If it does so through a graph that was made before the closure ran: the
            old policy was not detached, and its gradient would be taken for the new one's.
    """
    targets = set(map(id, objective.vector.parameters))
    roots = [value.grad_fn for value in (values.loss, values.kl)]
    stack: list[tuple[Any, bool]] = [(root, False) for root in roots if root is not None]
    seen: set[tuple[Any, bool]] = set()
    reached = False
    while stack:
        node, earlier = stack.pop()
        if (node, earlier) in seen:
            continue
        seen.add((node, earlier))
        if id(getattr(node, "variable", None)) in targets:
            if earlier:
                raise TrustRegionError(
                    "The closure depends on the parameters through a tensor that was computed "
                    "before it ran, such as the old log-probabilities or the old distribution. "
                    "Compute these under torch.no_grad(), or detach() them."
                )
            reached = True
        elif not earlier:
            earlier = node._sequence_nr() < started
        following: Iterable[tuple[Any, int]] = node.next_functions
        stack.extend((child, earlier) for child, _ in following if child is not None)
    return reached
