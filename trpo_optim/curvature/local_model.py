"""The closure near the current parameters: its values, its gradient, and what makes products."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from trpo_optim.closure.checks import Numbers, Values
from trpo_optim.closure.evaluation import Objective
from trpo_optim.closure.lockstep import told
from trpo_optim.curvature.autograd_graph import (
    GraphSummary,
    calls_python,
    now,
    require_attached,
    require_kl_reaches,
    summary,
)
from trpo_optim.curvature.first_derivatives import (
    gradient_of,
    reached_by_backward,
    require_differentiable,
)
from trpo_optim.curvature.kl_precision import computed_in, resolution
from trpo_optim.errors import TrustRegionError
from trpo_optim.report import Engine

__all__ = [
    "LocalModel",
    "RefusedProductError",
    "checked",
    "first_order",
    "look_behind",
    "model_of",
    "require_kl_behind",
    "slope",
    "without_products",
]

Product = Callable[[Tensor], Tensor]
"""v ↦ Fv for vectors of shape (n,)."""


@dataclass(frozen=True)
class LocalModel:
    """The closure near the current parameters.

    Attributes:
        loss: The closure's first value.
        kl: The closure's KL, in nats; about zero.
        largest_kl: The largest KL of a sample, in nats; None where the closure gives the mean.
        kl_resolution: KLs closer than this cannot be told apart, in nats.
        precision: The unit of rounding of the coarsest parameter and of what the closure computes.
        gradient: ∇loss, shape (n,); empty where it was not asked for.
        product: v ↦ Fv, shape (n,), F the Hessian of the KL; undamped, symmetric and fixed.
        engine: What differentiates.
        kls: The KL of every closure behind the model, by the closure's name; each about zero.
        fallback: Why products are not Gauss–Newton, or empty if they are.
    """

    loss: float
    kl: float
    largest_kl: float | None
    kl_resolution: float
    precision: float
    gradient: Tensor
    product: Product
    engine: Engine
    kls: Mapping[str, float]
    fallback: str = ""

    def released(self) -> LocalModel:
        """Return the model without its products, and so without the graph that they hold."""
        return replace(self, product=_no_product)


def first_order(objective: Objective, *, curved: bool = False) -> LocalModel:
    """Return the local model without curvature; one evaluation of the closure.

    Args:
        objective: The closure.
        curved: Whether the curvature comes from elsewhere, so that the KL matters.

    Returns:
        A model whose ``product`` is not to be called.
    """
    values = _attached(objective)
    behind = summary(values.kl) if curved else None
    hides = behind is not None and behind.calls_python
    objective.kl_dtype = computed_in(values.kl)
    gradient = gradient_of(values.loss, objective, retain_graph=hides)
    if behind is not None:
        require_kl_behind(gradient, behind, values.kl, objective)
    return model_of(objective, values, gradient, _no_product, "autograd")


def require_kl_behind(
    gradient: Tensor | None, behind: GraphSummary, kl: Tensor, objective: Objective
) -> None:
    """Check that the KL depends on every parameter along which the loss has a slope.

    All ranks that evaluate together learn of it, before another closure runs.

    Args:
        gradient: That of the loss, shape (n,), or None.
        behind: What lies behind the KL.
        kl: The KL, with its graph.
        objective: The closure.

    Raises:
        TrustRegionError: If it does not.
    """
    leaves, reached = objective.vector.leaves, behind.leaves
    with told(objective.lockstep):
        if gradient is None or reached.issuperset(map(id, leaves)):
            return
        if behind.calls_python:
            reached |= reached_by_backward(kl, objective)
        vector = objective.vector
        require_kl_reaches(vector.split(gradient), reached, leaves, vector)


def look_behind(kl: Tensor, objective: Objective) -> GraphSummary:
    """Return what lies behind a KL, and note what that means for products of its closure.

    Args:
        kl: With its graph.
        objective: The closure that made it.
    """
    behind = summary(kl)
    objective.dear, objective.kl_dtype = objective.dear or behind.dear, computed_in(kl)
    return behind


def slope(objective: Objective, *, loss: bool) -> tuple[float, Tensor]:
    """Return a closure's KL, in nats, and its gradient where the parameters now are, shape (n,).

    Args:
        objective: The closure.
        loss: Whether its loss is used, and so is to be a number.

    Returns:
        The KL and the gradient; NaN where the closure's values are no numbers.
    """
    vector = objective.vector
    numbers, finite = Numbers(math.nan, math.nan), False

    def check(made: Values) -> None:
        nonlocal numbers, finite
        numbers = made.numbers()
        finite = math.isfinite(numbers.kl) and (math.isfinite(numbers.loss) or not loss)
        if finite:
            require_differentiable(made.kl, vector)

    values = objective.with_graph_elsewhere(check)
    if not objective.everywhere(finite) or values is None:
        return math.nan, torch.full_like(vector.current(), math.nan)
    if objective.calls_python is None:
        objective.calls_python = calls_python(values.kl)
    return numbers.kl, gradient_of(values.kl, objective, may_refuse=objective.calls_python)


def _attached(objective: Objective) -> Values:
    """Evaluate a closure, and check that its values can be differentiated, on all ranks alike."""
    started, vector = now(), objective.vector

    def check(values: Values) -> None:
        require_attached((values.loss, values.kl), vector.leaves, started)
        require_differentiable(values.loss, vector)

    return objective.with_graph(check)


def without_products(objective: Objective, reason: str, *, gradient: bool) -> LocalModel:
    """Return a model for finite differences; one evaluation of the closure.

    Args:
        objective: The closure.
        reason: Why finite differences serve.
        gradient: Whether the gradient of the loss is wanted too.
    """
    values = _attached(objective)
    behind = look_behind(values.kl, objective)
    slopes = None
    if gradient:
        slopes = gradient_of(values.loss, objective, retain_graph=behind.calls_python)
    require_kl_behind(slopes, behind, values.kl, objective)
    return model_of(objective, values, slopes, _no_product, "finite differences", reason)


class RefusedProductError(TrustRegionError):
    """Torch has refused a second derivative only when it was asked for."""


def checked(product: Product, objective: Objective, engine: Engine) -> Product:
    """Return a product whose refusal names the engine.

    Args:
        product: v ↦ Fv.
        objective: The closure that it was made from.
        engine: What made it.
    """

    def named_product(direction: Tensor) -> Tensor:
        try:
            with objective.kernels():
                return product(direction)
        except torch.OutOfMemoryError:
            raise
        except RuntimeError as error:
            raise RefusedProductError(
                f"torch cannot differentiate the closure twice: {engine}: {error}"
            ) from error

    return named_product


def model_of(
    objective: Objective,
    values: Values,
    gradient: Tensor | None,
    product: Product,
    engine: Engine,
    fallback: str = "",
) -> LocalModel:
    """Assemble a model.

    Args:
        objective: The closure.
        values: What it returned.
        gradient: That of the loss, shape (n,); None where it was not asked for.
        product: v ↦ Fv.
        engine: What made the product.
        fallback: Why another engine did not.

    Returns:
        The model.
    """
    loss, kl, largest_kl = values.numbers()
    dtype = objective.kl_dtype or values.kl.dtype
    return LocalModel(
        loss=loss,
        kl=kl,
        largest_kl=largest_kl,
        kl_resolution=resolution(dtype),
        precision=max(objective.precision, torch.finfo(dtype).eps),
        gradient=torch.empty(0) if gradient is None else gradient,
        product=checked(product, objective, engine),
        engine=engine,
        kls={objective.name: kl},
        fallback=fallback,
    )


def _no_product(vector: Tensor) -> Tensor:
    raise NotImplementedError
