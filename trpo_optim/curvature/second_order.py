"""Fisher-vector products of a closure, by the engine that serves it.

Three engines make the same operator. If no engine works, or if its products cost more, products are
finite differences of ``slope``.
"""

from __future__ import annotations

from typing import NoReturn

import torch
from torch import Tensor

from trpo_optim.closure.checks import Values
from trpo_optim.closure.evaluation import Objective
from trpo_optim.closure.interception import RefusedError
from trpo_optim.curvature.autograd_graph import GraphSummary, now, require_attached
from trpo_optim.curvature.double_backward import by_double_backward
from trpo_optim.curvature.engine_choice import (
    EngineChoice,
    learn,
    nothing_learned,
    torch_func_first,
)
from trpo_optim.curvature.first_derivatives import require_differentiable
from trpo_optim.curvature.gauss_newton import gauss_newton
from trpo_optim.curvature.local_model import (
    LocalModel,
    Product,
    RefusedProductError,
    checked,
    look_behind,
    model_of,
    require_kl_behind,
    without_products,
)
from trpo_optim.curvature.torch_func import ThirdValueError, by_torch_func, obstacle
from trpo_optim.errors import TrustRegionError
from trpo_optim.hyperparameters import EngineName
from trpo_optim.report import Engine

__all__ = [
    "FIRST_DERIVATIVES_ALONE",
    "NO_THIRD_VALUE",
    "named",
    "product_again",
    "refuse",
    "second_order",
]

NO_THIRD_VALUE = (
    "the closure returned no third value; with (loss, kl, dist) products would be Gauss-Newton, at "
    "about half the cost"
)


FIRST_DERIVATIVES_ALONE = (
    "FSDP has sharded the parameters and gives first derivatives alone, so the engine is 'finite "
    "differences'"
)


def named(engine: EngineName) -> str:
    """Return what a report says of an engine that the user named; empty for ``"auto"``.

    Args:
        engine: The hyperparameter.
    """
    return "" if engine == "auto" else f"engine is {engine!r}"


def refuse(engine: EngineName, reason: str) -> NoReturn:
    """Raise the error that a named engine does not serve.

    Args:
        engine: The hyperparameter.
        reason: Why it does not.

    Raises:
        TrustRegionError: Always.
    """
    raise TrustRegionError(
        f"engine is {engine!r}, which does not serve this closure: {reason}. Set engine='auto', "
        "which chooses an engine that does."
    )


def second_order(
    objective: Objective,
    choice: EngineChoice | None = None,
    *,
    engine: EngineName = "auto",
    gradient: bool = True,
) -> LocalModel:
    """Return the local model; one evaluation of the closure, unless an engine is refused.

    By itself, a closure of two values is differentiated by torch.func, and where torch.func refuses
    it, by double backward. A closure of three values has Gauss–Newton products, and where its third
    value does not serve, those of double backward. Where torch cannot differentiate it twice, the
    model says that finite differences are to serve, and has no products.

    Args:
        objective: The closure.
        choice: What earlier steps have learned; updated. None: nothing.
        engine: What is to make the products.
        gradient: Whether the gradient of the loss is wanted too.

    Returns:
        The model, with the engine that made it.

    Raises:
        TrustRegionError: If the closure is misused, or the named engine does not serve it.
        RuntimeError: Whatever the closure itself raises.
    """
    choice = nothing_learned() if choice is None else choice
    if objective.vector.fsdp:
        if engine not in {"auto", "finite differences"}:
            refuse(engine, FIRST_DERIVATIVES_ALONE)
        reason = named(engine) or FIRST_DERIVATIVES_ALONE
        return without_products(objective, reason, gradient=gradient)
    if engine == "finite differences":
        return without_products(objective, named(engine), gradient=gradient)
    if engine == "auto" and choice["flaw"]:
        return without_products(objective, choice["flaw"], gradient=gradient)
    model = _second_order(objective, choice, engine, gradient=gradient)
    if not (choice["proven"] or model.engine == "finite differences"):  # try one
        try:
            model.product(torch.ones_like(objective.vector.current()))
        except RefusedProductError as error:
            return _flawed(objective, choice, engine, str(error), gradient=gradient)
    return model


def product_again(objective: Objective, engine: Engine) -> Product:
    """Return the products of a closure that was evaluated and checked before; one evaluation.

    Args:
        objective: The closure.
        engine: What made its products then.

    Returns:
        v ↦ Fv, for vectors of shape (n,).

    Raises:
        TrustRegionError: If the engine does not serve any more, or the KL is detached.
    """
    if engine == "torch.func":
        found = by_torch_func(objective, gradient=False, without_third=True)
        return checked(found[2], objective, engine)
    vector = objective.vector
    # with_graph, because compiled modules have no second derivatives
    values = objective.with_graph(lambda again: require_differentiable(again.kl, vector))
    made = _made(engine, None, values, objective)
    if isinstance(made, str):
        raise TrustRegionError(f"{engine} served the closure, and does not serve it again: {made}.")
    return checked(made[1], objective, engine)


def _second_order(
    objective: Objective, choice: EngineChoice, engine: EngineName, *, gradient: bool
) -> LocalModel:
    parameters = objective.vector.parameters
    hindered, refusal = obstacle(parameters), choice["refusal"]
    wanted = engine == "torch.func"
    if wanted and hindered:
        refuse(engine, hindered)
    first = not hindered and (wanted or (engine == "auto" and torch_func_first(choice, objective)))
    if first:
        found = _of_torch_func(objective, choice, engine, gradient=gradient)
        if isinstance(found, LocalModel):
            return found
        refusal = found or refusal
    started = now()
    values = objective.with_graph()
    behind = look_behind(values.kl, objective)
    # Learned only now: where this evaluation fails as well, it is not torch.func that refuses.
    learn(choice, objective, third=values.third is not None, refusal=refusal)
    if engine == "auto" and not (first or hindered or refusal or objective.third):
        return _second_order(objective, choice, engine, gradient=gradient)  # three were expected
    loss = values.loss if gradient else None
    if not require_attached(
        [values.kl] if loss is None else [loss, values.kl], parameters, started
    ):
        flaw = (
            "the graph shows none of the parameters: an autograd.Function hides them, as a "
            "checkpoint with use_reentrant=True does"
        )
        return _flawed(objective, choice, engine, flaw, gradient=gradient)
    made = _of_graph(objective, engine, loss, values, behind, hindered or refusal)
    if isinstance(made, str):
        flaw = f"torch cannot differentiate the closure twice: {made}"
        return _flawed(objective, choice, engine, flaw, gradient=gradient)
    by, reason, slopes, product = made
    require_kl_behind(slopes, behind, values.kl, objective)
    return model_of(objective, values, slopes, product, by, named(engine) or reason)


def _of_torch_func(
    objective: Objective, choice: EngineChoice, engine: EngineName, *, gradient: bool
) -> LocalModel | str:
    """Return the model by torch.func, or why it refuses; empty if the closure has a third value."""
    wanted = engine == "torch.func"
    try:
        found = by_torch_func(objective, gradient=gradient, without_third=wanted)
    except ThirdValueError:
        return ""
    except RefusedError as error:
        if wanted:
            refuse(engine, str(error))
        return str(error)
    learn(choice, objective, third=False, refusal="")
    return model_of(objective, *found, "torch.func", named(engine) or NO_THIRD_VALUE)


def _of_graph(
    objective: Objective,
    engine: EngineName,
    loss: Tensor | None,
    values: Values,
    behind: GraphSummary,
    refusal: str,
) -> tuple[Engine, str, Tensor | None, Product] | str:
    """Return which engine serves a graph, why not another, and what it made; or why none does."""
    reason = ""
    if values.third is None:
        if engine == "Gauss-Newton":
            refuse(engine, "it returns no third value")
        refusal = refusal or "the closure returns a third value at some evaluations only"
        reason = f"torch.func does not serve: {refusal}; {NO_THIRD_VALUE}"
    elif engine != "double backward":
        made = _made("Gauss-Newton", loss, values, objective)
        if not isinstance(made, str):
            return "Gauss-Newton", "", *made
        if engine == "Gauss-Newton":
            refuse(engine, made)
        reason = made
    if behind.once_differentiable:
        return f"the backward of {behind.once_differentiable} is marked once_differentiable"
    made = _made("double backward", loss, values, objective)
    return made if isinstance(made, str) else ("double backward", reason, *made)


def _made(
    engine: Engine, loss: Tensor | None, values: Values, objective: Objective
) -> tuple[Tensor | None, Product] | str:
    """Return the gradient of the loss and v ↦ Fv by an engine, or why it does not serve."""
    try:
        with objective.kernels():
            if engine == "Gauss-Newton":
                return gauss_newton(loss, values.kl, values.third, objective.vector)
            return by_double_backward(loss, values.kl, objective)
    except torch.OutOfMemoryError:
        raise
    except RuntimeError as error:
        return str(error)


def _flawed(
    objective: Objective, choice: EngineChoice, engine: EngineName, flaw: str, *, gradient: bool
) -> LocalModel:
    """Have finite differences serve from now on, unless the user named an engine."""
    if engine != "auto":
        refuse(engine, flaw)
    choice["flaw"] = flaw
    return without_products(objective, flaw, gradient=gradient)
