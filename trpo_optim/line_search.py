"""Which share of a step to take: backtracking on the measured KL and improvement, or all of it."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

from trpo_optim.hyperparameters import Hyperparameters
from trpo_optim.report import Outcome

__all__ = ["Prediction", "Search", "Trial", "backtrack", "whole_step"]

_TARGET = 0.98
"""Share of the radius that a shortened step aims at: below 1, so that a small error of the model
does not cost another trial."""


@dataclass(frozen=True)
class Trial:
    """What the closure said at a trial point: its two values, and how much better the first is."""

    loss: float
    kl: float
    improvement: float

    @property
    def finite(self) -> bool:
        """Whether both values are numbers."""
        return math.isfinite(self.loss) and math.isfinite(self.kl)


@dataclass(frozen=True)
class Prediction:
    """What the local model promises of the full step: gᵀs and ½ sᵀFs (nats)."""

    improvement: float
    kl: float


@dataclass(frozen=True)
class Search:
    """How a search ended: the last trial, at which share of the step, after how many backtracks."""

    outcome: Outcome
    trial: Trial
    scale: float
    backtracks: int


def whole_step(
    attempt: Callable[[float], Trial],
    prediction: Prediction,  # noqa: ARG001 (one signature for all modes)
    settings: Hyperparameters,  # noqa: ARG001 (one signature for all modes)
) -> Search:
    """Accept the full step if the closure stays finite there.

    Args:
        attempt: From a share of the step to the trial there.
        prediction: Not used.
        settings: Not used.

    Returns:
        The search, after one trial.
    """
    trial = attempt(1.0)
    return Search(Outcome.ACCEPTED if trial.finite else Outcome.NON_FINITE_TRIAL, trial, 1.0, 0)


def backtrack(
    attempt: Callable[[float], Trial], prediction: Prediction, settings: Hyperparameters
) -> Search:
    """Shorten the step until KL ≤ δ and the improvement is a fair share of the predicted one.

    A trial beyond the radius is shortened by the KL that it measured, one that improves too little
    by ``backtrack_ratio``. A trial that is NaN or infinite ends the search: a step next to such a
    point is not a safe one.

    Args:
        attempt: From a share of the step to the trial there.
        prediction: The local model's promise for the full step.
        settings: ``max_kl`` (δ, nats), ``improvement_ratio``, ``backtrack_ratio``,
            ``max_backtracks``.

    Returns:
        The search; its trial is the last one, accepted or not.

    Source:
        Schulman et al. (2015), appendix C, step 3.
    """
    radius = float("inf") if settings.max_kl is None else settings.max_kl
    scale, shorter = 1.0, (0.0, prediction.kl)
    for backtracks in range(settings.max_backtracks + 1):
        trial = attempt(scale)
        promised = settings.improvement_ratio * scale * prediction.improvement
        if not trial.finite:
            return Search(Outcome.NON_FINITE_TRIAL, trial, scale, backtracks)
        if trial.kl > radius:
            outcome = Outcome.KL_ABOVE_RADIUS
            measured = (scale, trial.kl / scale**2)
            following = _scale_at(_TARGET * radius, shorter, measured)
            shorter = measured
        elif trial.improvement <= 0 or trial.improvement < promised:
            outcome = Outcome.NO_IMPROVEMENT
            following = scale * settings.backtrack_ratio
        else:
            return Search(Outcome.ACCEPTED, trial, scale, backtracks)
        last = Search(outcome, trial, scale, backtracks)
        scale = following
    return last


def _scale_at(kl: float, known: tuple[float, float], beyond: tuple[float, float]) -> float:
    """Return the scale at which KL(t) = t²(a + bt) reaches ``kl``.

    The cubic goes through two points, each (t, KL(t)/t²); at t = 0 the second entry is the
    prediction of the local model. ``beyond`` has a KL above ``kl``, so a root lies before it.
    """
    (near, ratio_near), (far, ratio_far) = known, beyond
    slope = (ratio_far - ratio_near) / (far - near)
    low, high = 0.0, far
    for _ in range(60):
        middle = (low + high) / 2
        if middle**2 * (ratio_far + slope * (middle - far)) > kl:
            high = middle
        else:
            low = middle
    return high
