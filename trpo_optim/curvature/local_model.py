"""The closure near the current parameters: gradient and Fisher-vector products.

Three engines make the same operator, and ``second_order`` chooses one of them. Where none can,
products are finite differences of ``slope``.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from trpo_optim.closure.checks import Numbers, Values
from trpo_optim.closure.evaluation import Objective
from trpo_optim.closure.interception import RefusedError
from trpo_optim.closure.parameters import ParameterVector
from trpo_optim.curvature.autograd_graph import (
    GraphSummary,
    now,
    require_attached,
    require_kl_reaches,
    summary,
)
from trpo_optim.curvature.double_backward import by_double_backward
from trpo_optim.curvature.engine_choice import (
    EngineChoice,
    learn,
    nothing_learned,
    torch_func_first,
)
from trpo_optim.curvature.first_derivatives import gradient_of
from trpo_optim.curvature.gauss_newton import gauss_newton
from trpo_optim.curvature.torch_func import ThirdValueError, by_torch_func, obstacle
from trpo_optim.errors import TrustRegionError
from trpo_optim.report import Engine

__all__ = ["NO_THIRD_VALUE", "LocalModel", "first_order", "second_order", "slope"]

Product = Callable[[Tensor], Tensor]
"""v ↦ Fv for vectors of shape (n,)."""

NO_THIRD_VALUE = (
    "the closure returned no third value; with (loss, kl, dist) products would be Gauss-Newton, at "
    "about half the cost"
)


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
    started = now()
    values = objective.with_graph()
    require_attached((values.loss, values.kl), objective.vector.parameters, started)
    behind = summary(values.kl) if curved else None
    gradient = gradient_of(values.loss, objective)
    if behind is not None:
        _require_kl_reaches(gradient, behind, objective.vector)
    return _model(objective, values, gradient, _no_product, "autograd")


def _require_kl_reaches(
    gradient: Tensor | None, behind: GraphSummary, vector: ParameterVector
) -> None:
    if gradient is not None and not behind.leaves.issuperset(map(id, vector.parameters)):
        require_kl_reaches(vector.split(gradient), behind, vector.parameters)


def slope(objective: Objective, *, loss: bool) -> tuple[float, Tensor]:
    """Return a closure's KL, in nats, and its gradient where the parameters now are, shape (n,).

    Args:
        objective: The closure.
        loss: Whether its loss is used, and so is to be a number.

    Returns:
        The KL and the gradient; NaN where the closure's values are no numbers.
    """
    values = objective.with_graph_elsewhere()
    numbers = Numbers(math.nan, math.nan) if values is None else values.numbers()
    finite = math.isfinite(numbers.kl) and (math.isfinite(numbers.loss) or not loss)
    if values is None or not finite:
        return math.nan, torch.full_like(objective.vector.current(), math.nan)
    return numbers.kl, gradient_of(values.kl, objective)


def second_order(
    objective: Objective,
    choice: EngineChoice | None = None,
    *,
    gradient: bool = True,
    trial: bool = True,
) -> LocalModel:
    """Return the local model; one evaluation of the closure, unless an engine is refused.

    A closure of two values is differentiated by torch.func, and where torch.func refuses it, by
    double backward. A closure of three values has Gauss–Newton products, and where its third value
    does not serve, those of double backward. Where torch cannot differentiate it twice, the model
    says that finite differences are to serve, and has no products.

    Args:
        objective: The closure.
        choice: What earlier steps have learned; updated. None: nothing.
        gradient: Whether the gradient of the loss is wanted too.
        trial: Whether to try a product, should nothing be known of the closure.

    Returns:
        The model, with the engine that made it.

    Raises:
        TrustRegionError: If the closure is misused.
        RuntimeError: Whatever the closure itself raises.
    """
    choice = nothing_learned() if choice is None else choice
    model = _second_order(objective, choice, gradient=gradient)
    if trial and not (choice["proven"] or choice["flaw"]):
        try:
            model.product(torch.ones_like(objective.vector.current()))
        except _RefusedProductError as error:
            choice["flaw"] = str(error)
            return _without_products(objective, choice["flaw"], gradient=gradient)
    return model


def _second_order(objective: Objective, choice: EngineChoice, *, gradient: bool) -> LocalModel:
    if choice["flaw"]:
        return _without_products(objective, choice["flaw"], gradient=gradient)
    vector = objective.vector
    hindered = obstacle(vector.parameters)
    refusal = choice["refusal"]
    if first := not hindered and torch_func_first(choice, objective):
        try:
            found = by_torch_func(objective, gradient=gradient)
        except ThirdValueError:
            pass
        except RefusedError as error:
            refusal = str(error)
        else:
            learn(choice, objective, third=False, refusal="")
            return _model(objective, *found, "torch.func", NO_THIRD_VALUE)
    started = now()
    values = objective.with_graph()
    # Learned only now: where this evaluation fails as well, it is not torch.func that refuses.
    learn(choice, objective, third=values.third is not None, refusal=refusal)
    if not (first or hindered or refusal or objective.third):  # it was expected to return three
        return _second_order(objective, choice, gradient=gradient)
    loss = values.loss if gradient else None
    wanted = [values.kl] if loss is None else [loss, values.kl]
    if not require_attached(wanted, vector.parameters, started):
        choice["flaw"] = (
            "the graph shows none of the parameters: an autograd.Function hides them, as a "
            "checkpoint with use_reentrant=True does"
        )
        return _without_products(objective, choice["flaw"], gradient=gradient)
    behind = summary(values.kl)
    if values.third is None:
        refusal = (
            hindered or refusal or "the closure returns a third value at some evaluations only"
        )
        fallback = f"torch.func does not serve: {refusal}; {NO_THIRD_VALUE}"
    else:
        with objective.kernels():
            made = gauss_newton(loss, values.kl, values.third, vector)
        if not isinstance(made, str):
            _require_kl_reaches(made[0], behind, vector)
            return _model(objective, values, *made, "Gauss-Newton")
        fallback = made
    if behind.once_differentiable:
        made = f"the backward of {behind.once_differentiable} is marked once_differentiable"
    else:
        with objective.kernels():
            made = by_double_backward(loss, values.kl, objective)
    if isinstance(made, str):
        choice["flaw"] = f"torch cannot differentiate the closure twice: {made}"
        return _without_products(objective, choice["flaw"], gradient=gradient)
    _require_kl_reaches(made[0], behind, vector)
    return _model(objective, values, *made, "double backward", fallback)


def _without_products(objective: Objective, flaw: str, *, gradient: bool) -> LocalModel:
    """Return a model for finite differences; one evaluation of the closure."""
    started = now()
    values = objective.with_graph()
    require_attached((values.loss, values.kl), objective.vector.parameters, started)
    behind = summary(values.kl)
    slopes = gradient_of(values.loss, objective) if gradient else None
    _require_kl_reaches(slopes, behind, objective.vector)
    return _model(objective, values, slopes, _no_product, "finite differences", flaw)


class _RefusedProductError(TrustRegionError):
    """Torch has refused a second derivative only when it was asked for."""


def _model(
    objective: Objective,
    values: Values,
    gradient: Tensor | None,
    product: Product,
    engine: Engine,
    fallback: str = "",
) -> LocalModel:
    """Assemble the model, with a product whose refusal names the engine."""

    def named_product(direction: Tensor) -> Tensor:
        try:
            with objective.kernels():
                return product(direction)
        except torch.OutOfMemoryError:
            raise
        except RuntimeError as error:
            raise _RefusedProductError(
                f"torch cannot differentiate the closure twice: {engine}: {error}"
            ) from error

    loss, kl, largest_kl = values.numbers()
    return LocalModel(
        loss=loss,
        kl=kl,
        largest_kl=largest_kl,
        kl_resolution=_resolution(values.kl.dtype),
        precision=max(objective.precision, torch.finfo(values.kl.dtype).eps),
        gradient=torch.empty(0) if gradient is None else gradient,
        product=named_product,
        engine=engine,
        kls={objective.name: kl},
        fallback=fallback,
    )


def _resolution(dtype: torch.dtype) -> float:
    """Return which KLs, in nats, rounding leaves nothing of: sums in half precision have bias."""
    eps = torch.finfo(dtype).eps
    return 50 * eps if dtype in (torch.float16, torch.bfloat16) else min(10 * eps, 1e-6)


def _no_product(vector: Tensor) -> Tensor:
    raise NotImplementedError
