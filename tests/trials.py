"""Trials by a script: what the line search sees of a step."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch

from trpo_optim import TrustRegionOptimizer
from trpo_optim.algorithm.line_search import Prediction, Search, Trial, backtrack
from trpo_optim.hyperparameters import Hyperparameters

DELTA = 0.01
ABOVE = math.nextafter(DELTA, 1.0)
PREDICTED = 0.97 * DELTA  # the most that does not shorten the first trial
GOOD = Trial(loss=-1.0, kl=0.5 * DELTA, improvement=1.0)
AT_RADIUS = Trial(loss=-1.0, kl=DELTA, improvement=1.0)
BEYOND = Trial(loss=-1.0, kl=2 * DELTA, improvement=1.0)
JUST_BEYOND = Trial(loss=-1.0, kl=ABOVE, improvement=1.0)
WORSE = Trial(loss=1.0, kl=0.5 * DELTA, improvement=-1.0)


def settings(**changes: Any) -> Hyperparameters:
    defaults = TrustRegionOptimizer([torch.zeros(1)], max_kl=DELTA).defaults
    return Hyperparameters(**{**defaults, **changes})


def search(
    attempt: Callable[[float], Trial],
    *,
    promised: float = 1.0,
    predicted_kl: float = PREDICTED,
    own_kl: Callable[[float], float] | None = None,
    **changes: Any,
) -> tuple[Search, list[float]]:
    """A backtracking search, and the scales that it tried."""
    scales: list[float] = []

    def recorded(scale: float) -> Trial:
        scales.append(scale)
        return attempt(scale)

    prediction = Prediction(promised, predicted_kl, own_kl)
    result = backtrack(recorded, prediction, settings(**changes))
    return result, scales


def scripted(trials: Sequence[Trial]) -> Callable[[float], Trial]:
    """An attempt that says these things in turn, whatever the scale."""
    following = iter(trials)
    return lambda _: next(following)
