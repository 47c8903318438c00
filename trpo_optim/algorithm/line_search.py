"""Which share of a step to take: backtracking on the measured KL and improvement, or all of it."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace

from trpo_optim.hyperparameters import Hyperparameters
from trpo_optim.report import Outcome

__all__ = ["Prediction", "Search", "Trial", "backtrack", "whole_step"]

_FIRST, _TARGET, _ENOUGH = 0.97, 0.98, 0.9
"""Shares of the radius: where the first trial aims by the model, where a further one aims by what
was measured, and from where on no other is made. See docs/results/step-quality.md."""

_NEAR, _EQUAL = 0.2, 0.01
"""A model of other samples is kept if the batch's KL differs from the predicted one by at most the
first share, or from the KL of these samples by at most the second."""

_MOST_GROWTH = 2.0
"""How many times the first trial may be lengthened."""

_Point = tuple[float, float]
"""A share of the step, and the KL measured there."""


@dataclass(frozen=True)
class Trial:
    """What the closure said at a trial point.

    Attributes:
        loss: Its first value.
        kl: The mean KL, in nats.
        improvement: How much better the loss is than at the start.
        largest_kl: The largest KL of a sample, in nats, or None where it is not known.
    """

    loss: float
    kl: float
    improvement: float
    largest_kl: float | None = None

    @property
    def finite(self) -> bool:
        """Whether both values are numbers."""
        return math.isfinite(self.loss) and math.isfinite(self.kl)


@dataclass(frozen=True)
class Prediction:
    """What the local model promises of the full step.

    Attributes:
        improvement: gᵀs.
        kl: ½ sᵀFs, in nats.
        own_kl: Measures at a share of the step the KL of the samples that F is of, in nats. A step
            that is solved on a part of the batch moves the other samples more than it promises.
            None: F is of the whole batch.
    """

    improvement: float
    kl: float
    own_kl: Callable[[float], float] | None = None


@dataclass(frozen=True)
class Search:
    """How a search ended: the trial, at which share of the step, after how many further ones."""

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
    """Fit the step's length until KL ≤ δ and the improvement is a fair share of the predicted one.

    With ``constraint="max"`` it is the largest KL of a sample that is held to δ. The first trial
    aims just inside the radius, by the local model (of the mean). One beyond the radius is
    followed by one that aims just inside it by the KLs measured so far, and if that falls far
    short, by one between the two. A first trial that falls far short is lengthened once, unless its
    KL is negative, as a sampled one may be: it lies within the radius, but tells nothing of the
    length. A trial that improves too little is shortened by ``backtrack_ratio``. A trial that is
    NaN or infinite ends the search: a step next to such a point is not a safe one, unless only the
    lengthening of an acceptable one met it.

    ``lr`` below 1 multiplies the step that was so found, which takes one more trial. A search that
    aimed at lr²δ instead would not be monotonic: at one lr its first trial is accepted, at a larger
    one it is shortened.

    Args:
        attempt: From a share of the step to the trial there.
        prediction: The local model's promise for the full step, whose KL is δ.
        settings: ``max_kl`` (δ, nats), ``constraint``, ``improvement_ratio``,
            ``backtrack_ratio``, ``max_backtracks``, ``lr``.

    Returns:
        The search; its trial is the accepted one, or else the last.

    Source:
        Schulman et al. (2015), appendix C, step 3.
    """
    assert settings.max_kl is not None  # as the mode requires
    first = math.sqrt(_FIRST * settings.max_kl / max(prediction.kl, _FIRST * settings.max_kl))
    if settings.lr >= 1:
        return _fitted(attempt, prediction, settings, first)
    if settings.max_backtracks == 0:  # there is one trial, and no other to fit the length by
        return _shortened(attempt, prediction, settings, settings.lr * first, 0)
    fitted = _fitted(attempt, prediction, settings, first)
    if fitted.outcome is not Outcome.ACCEPTED:
        return fitted
    scale = settings.lr * fitted.scale
    return _shortened(attempt, prediction, settings, scale, fitted.backtracks + 1)


def _fitted(
    attempt: Callable[[float], Trial],
    prediction: Prediction,
    settings: Hyperparameters,
    scale: float,
) -> Search:
    """Search for the length that fills the radius, from a first share of the step on."""
    radius = settings.max_kl
    assert radius is not None
    known: _Point | None = None  # the other measured point of the bracket
    beyond: _Point | None = None  # the last point beyond the radius
    short: Search | None = None  # acceptable, but with much of the radius left
    for backtracks in range(settings.max_backtracks + 1):
        trial = attempt(scale)
        found = _judged(Search(Outcome.ACCEPTED, trial, scale, backtracks), prediction, settings)
        if found.outcome is Outcome.NON_FINITE_TRIAL:
            if short is not None and beyond is None:
                break  # only a longer step was not
            return found
        held = _held(trial, settings)
        if found.outcome is Outcome.KL_ABOVE_RADIUS:
            last = found
            known = known if short is not None else beyond
            beyond = (scale, held)
        elif found.outcome is Outcome.NO_IMPROVEMENT:
            last = found
            beyond = None
        elif short is not None and trial.improvement < short.trial.improvement:
            break
        elif held >= _ENOUGH * radius or (beyond is None and (backtracks > 0 or held < 0)):
            return found
        else:
            short = found
            known = (scale, held)
        if backtracks == settings.max_backtracks:
            break
        if beyond is not None:
            if known is None:
                place, ratio = 0.0, _quadratic(prediction, found, held)
            else:
                place = known[0] / beyond[0]
                ratio = known[1] / place**2
            scale = beyond[0] * _share(_TARGET * radius, beyond[1], place, ratio)
        elif backtracks == 0 and short is not None:
            scale *= min(_MOST_GROWTH, math.sqrt(_TARGET * radius / max(held, 1e-300)))
        else:
            scale *= settings.backtrack_ratio
        if short is not None and scale <= short.scale:
            break
    return last if short is None else replace(short, backtracks=backtracks)


def _shortened(
    attempt: Callable[[float], Trial],
    prediction: Prediction,
    settings: Hyperparameters,
    scale: float,
    backtracks: int,
) -> Search:
    """Try a share of the step, and smaller ones by ``backtrack_ratio`` until one is acceptable."""
    while True:
        trial = Search(Outcome.ACCEPTED, attempt(scale), scale, backtracks)
        found = _judged(trial, prediction, settings)
        ended = found.outcome in (Outcome.ACCEPTED, Outcome.NON_FINITE_TRIAL)
        if ended or backtracks >= settings.max_backtracks:
            return found
        scale *= settings.backtrack_ratio
        backtracks += 1


def _judged(search: Search, prediction: Prediction, settings: Hyperparameters) -> Search:
    """Return the search with the outcome that its trial has."""
    trial = search.trial
    promised = settings.improvement_ratio * search.scale * prediction.improvement
    if not trial.finite:
        return replace(search, outcome=Outcome.NON_FINITE_TRIAL)
    if settings.max_kl is not None and _held(trial, settings) > settings.max_kl:
        return replace(search, outcome=Outcome.KL_ABOVE_RADIUS)
    if trial.improvement <= 0 or trial.improvement < promised:
        return replace(search, outcome=Outcome.NO_IMPROVEMENT)
    return search


def _held(trial: Trial, settings: Hyperparameters) -> float:
    """Return the KL that is held to the radius."""
    held = trial.kl if settings.constraint == "mean" else trial.largest_kl
    assert held is not None  # as required before
    return held


def _quadratic(prediction: Prediction, search: Search, held: float) -> float:
    """Return what the KL that is held would be at the last trial if it were quadratic."""
    kl, predicted = search.trial.kl, prediction.kl * search.scale**2
    own_kl = prediction.own_kl
    if (
        own_kl is None
        or abs(predicted - kl) <= _NEAR * kl
        or abs(own_kl(search.scale) - kl) <= _EQUAL * kl
    ):
        return predicted * (held / kl if kl > 0 else 1.0)
    return held  # the model says nothing of the batch


def _share(kl: float, measured: float, place: float, ratio: float) -> float:
    """Return the share of a trial's step at which a curve of the KL reaches a value.

    The curve goes through that trial, at t = 1, and through another point. If KL(t)/t² grows
    with t, it is a t² exp(bt): beyond the quadratic term, such KLs grow faster than any fixed power
    would have it. On random policies this curve needs fewer trials than a cubic. If KL(t)/t² falls,
    the curve is a ln(1 + bt²). KLs of language models bend down like this far beyond the radius.

    Args:
        kl: The value to reach, below ``measured``.
        measured: The KL at the trial.
        place: The t of the other point. It is 0 at the start of the step.
        ratio: KL(t)/t² at this point.

    Returns:
        A share between 0.01 and 0.999.
    """
    growth = (_log(measured) - _log(ratio)) / (1 - place)
    if growth >= 0:
        fall = _log(kl) - _log(measured)
        return _crossing(lambda t: 2 * math.log(t) + growth * (t - 1) - fall, 0.01, 0.999)
    bend = _bend(place, ratio / measured)
    return _crossing(
        lambda t: math.log1p(bend * t**2) - kl / measured * math.log1p(bend), 0.01, 0.999
    )


def _bend(place: float, ratio: float) -> float:
    """Return the b > 0 of a curve KL(t) = ln(1 + bt²), or the nearest b in its range.

    Args:
        place: A place t other than 1.
        ratio: KL(t)/t² there, over KL(1).
    """

    def excess(power: float) -> float:
        bend = math.exp(power)
        there = math.log1p(bend * place**2) / place**2 if place > 0 else bend
        return there / math.log1p(bend) - ratio

    falling = -1.0 if place > 1 else 1.0  # from 1 at b = 0 to 1/place²
    return math.exp(_crossing(lambda power: falling * excess(power), -20.0, 30.0))


def _crossing(rising: Callable[[float], float], low: float, high: float) -> float:
    """Return where a rising function crosses zero, from above, or the nearest end."""
    for _ in range(50):
        middle = (low + high) / 2
        if rising(middle) > 0:
            high = middle
        else:
            low = middle
    return high


def _log(value: float) -> float:
    """Return the logarithm, of the smallest number where there is none."""
    return math.log(max(value, 5e-324))
