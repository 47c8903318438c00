"""One step in the order of the paper: local model, direction, length, search."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from trpo_optim.algorithm.conjugate_gradient import Ending, Solution
from trpo_optim.algorithm.direction import DirectionSolver, elsewhere
from trpo_optim.algorithm.interfaces import Batch, LocalModel, Parameters
from trpo_optim.algorithm.kl_checks import (
    require_largest_kl,
    require_moving_kl,
    require_resolved,
    require_zero_kl,
)
from trpo_optim.algorithm.line_search import Prediction, Search, Trial
from trpo_optim.algorithm.modes import MODES
from trpo_optim.algorithm.preconditioner import DiagonalPreconditioner
from trpo_optim.errors import blaming
from trpo_optim.hyperparameters import Hyperparameters
from trpo_optim.long_vectors import dot, largest, norm, total
from trpo_optim.report import Outcome

__all__ = ["take_step"]

_SURPRISING = 1.75
"""How many times the predicted KL the measured one may be, or the other way round."""


def take_step(
    batch: Batch,
    parameters: Parameters,
    settings: Hyperparameters,
    figures: dict[str, Any],
    preconditioner: DiagonalPreconditioner | None = None,
) -> Outcome:
    """Go through one step, noting its figures on the way.

    Args:
        batch: The closures.
        parameters: What the closures depend on.
        settings: The hyperparameters.
        figures: Filled with the fields of a ``StepReport``, as far as the step comes.
        preconditioner: Takes the gradient, and scales the solve. None: the solve is not scaled.

    Returns:
        How the step ended. On ``Outcome.ACCEPTED`` the parameters lie at the new point; otherwise
        anywhere.
    """
    mode = MODES[settings.mode]
    if mode.curved and settings.max_kl is not None:
        figures["max_kl"] = settings.max_kl
    model = batch.second_order() if mode.curved else batch.first_order()
    sign = 1.0 if settings.maximize else -1.0
    uphill = model.gradient.mul_(sign)
    gradient_norm = _normalize(uphill)
    figures |= _figures_of_model(model, gradient_norm)
    if mode.radius_is_held:
        require_resolved(settings.max_kl, model.kl_resolution)
    for name, kl in model.kls.items() if mode.curved else ():
        with blaming(name):
            require_zero_kl(kl, model.kl_resolution, settings.max_kl)
    if mode.radius_is_held and settings.constraint == "max":
        require_largest_kl(model.largest_kl)
    if (flaw := _flaw_of_model(model, gradient_norm)) is not None:
        return flaw

    scale = preconditioner.scale(uphill) if preconditioner and mode.curved else None
    solver = DirectionSolver(batch, parameters, uphill, mode, settings, scale)
    solved = solver.solve(model)
    model = model.released()  # neither the trials nor a finite difference need the graph
    solved = solver.prove(solved, model)
    if not solved.settled:
        return take_step(batch, parameters, settings, figures, preconditioner)
    direction = solved.solution
    figures |= {
        "engine": solved.engine,
        "fallback": solved.fallback,
        "curvature": gradient_norm * gradient_norm * direction.curvature,
        "cg_iterations": direction.iterations,
        "cg_residual": direction.residual,
        "damping": direction.damping,
        "fisher_products": direction.products,
    }
    known = solved.safe or direction.products > 0  # else nothing was solved
    if mode.curved and known and (flaw := _flaw_of_direction(direction)) is not None:
        if flaw is Outcome.NON_POSITIVE_CURVATURE:
            require_moving_kl(model.kl, elsewhere(batch, parameters), model.kl_resolution)
        return flaw
    if not solved.safe:
        return Outcome.NON_FINITE_TRIAL

    length = mode.length(settings, gradient_norm, direction.curvature)
    step = length * direction.x
    step_norm = float(norm(step))
    if length == 0:
        return Outcome.ZERO_LEARNING_RATE
    if not math.isfinite(step_norm):
        return Outcome.NON_FINITE_TRIAL

    def own_kl(scale: float) -> float:
        parameters.move(step, scale)  # the last evaluation may have been elsewhere
        return batch.kl_of_curvature()

    prediction = Prediction(
        improvement=gradient_norm * float(dot(uphill, step)),
        kl=0.5 * length * length * direction.curvature,
        own_kl=own_kl if batch.curves_apart else None,
    )

    def attempt(scale: float) -> Trial:
        parameters.move(step, scale)
        values = batch.values()
        if mode.radius_is_held and settings.constraint == "max":
            require_largest_kl(values.largest_kl)
        improvement = sign * (values.loss - model.loss)
        return Trial(values.loss, values.kl, improvement, values.largest_kl)

    search = mode.search(attempt, prediction, settings)
    figures |= _figures_of_search(search, prediction)
    if search.trial.finite and _still(search, prediction, model):
        require_moving_kl(model.kl, elsewhere(batch, parameters), model.kl_resolution)
    if mode.curved and _is_surprising(search, prediction, model):
        batch.doubt()
    parameters.move(step, search.scale)  # undoes what an evaluation wrote
    change = parameters.change()
    figures["rounded_away"] = _lost_share(change, step)
    if search.outcome is Outcome.ACCEPTED:
        figures["step_norm"] = float(norm(change))
    return search.outcome


def _figures_of_model(model: LocalModel, gradient_norm: float) -> dict[str, Any]:
    return {
        "loss_before": model.loss,
        "loss_after": model.loss,
        "kl": model.kl,
        "largest_kl": _or_nan(model.largest_kl),
        "gradient_norm": gradient_norm,
        "engine": model.engine,
        "fallback": model.fallback,
    }


def _figures_of_search(search: Search, prediction: Prediction) -> dict[str, Any]:
    trial = search.trial
    figures = {
        "predicted_improvement": search.scale * prediction.improvement,
        "predicted_kl": search.scale**2 * prediction.kl,
        "backtracks": search.backtracks,
        "trial_loss": trial.loss,
        "trial_kl": trial.kl,
        "trial_largest_kl": _or_nan(trial.largest_kl),
    }
    if search.outcome is Outcome.ACCEPTED:
        figures |= {"loss_after": trial.loss, "improvement": trial.improvement, "kl": trial.kl}
        figures |= {"step_scale": search.scale, "largest_kl": _or_nan(trial.largest_kl)}
    return figures


def _or_nan(value: float | None) -> float:
    return math.nan if value is None else value


def _normalize(vector: Tensor) -> float:
    """Make a vector one of length 1, in place, and return the length that it had."""
    peak = largest(vector)
    if peak == 0 or not math.isfinite(peak):
        return peak
    length = norm(vector.div_(peak))  # so that no square under- or overflows
    vector.div_(length)
    return float(length) * peak


def _flaw_of_model(model: LocalModel, gradient_norm: float) -> Outcome | None:
    """Return why no direction follows from a local model, or None."""
    if not math.isfinite(model.loss):
        return Outcome.NON_FINITE_LOSS
    if not math.isfinite(model.kl):
        return Outcome.NON_FINITE_KL
    if not math.isfinite(gradient_norm):
        return Outcome.NON_FINITE_GRADIENT
    return Outcome.ZERO_GRADIENT if gradient_norm == 0 else None


def _flaw_of_direction(direction: Solution) -> Outcome | None:
    """Return why no step can follow a direction, or None."""
    if direction.ending is Ending.NON_FINITE:
        return Outcome.NON_FINITE_CURVATURE
    return None if direction.curvature > 0 else Outcome.NON_POSITIVE_CURVATURE


def _lost_share(change: Tensor, step: Tensor) -> float:
    """Return the share of the elements that a step was to move and that did not move."""
    counts = total(torch.stack([change.count_nonzero(), step.count_nonzero()]))
    moved, wanted = counts.tolist()
    return float(1 - moved / wanted) if wanted else 0.0


def _still(search: Search, prediction: Prediction, model: LocalModel) -> bool:
    """Return whether the KL stayed where it was after a step that should have moved it."""
    change = abs(search.trial.kl - model.kl)
    predicted = search.scale**2 * prediction.kl
    return change == 0 or change <= model.kl_resolution < predicted


def _is_surprising(search: Search, prediction: Prediction, model: LocalModel) -> bool:
    """Return whether the KL that products are taken of is far from the predicted one."""
    predicted = search.scale**2 * prediction.kl

    def is_far(measured: float) -> bool:
        """Return whether a KL is far from the prediction, though both are resolved."""
        resolved = min(measured, predicted) > 10 * model.kl_resolution
        return resolved and not 1 / _SURPRISING < measured / predicted < _SURPRISING

    if not is_far(search.trial.kl - model.kl):
        return False
    return prediction.own_kl is None or is_far(prediction.own_kl(search.scale))
