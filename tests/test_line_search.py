"""The line search over plain functions of the scale."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from typing import Any

import hypothesis
import pytest
import torch
from hypothesis import strategies as st

from trpo_optim import Outcome, TrustRegionOptimizer
from trpo_optim.hyperparameters import Hyperparameters
from trpo_optim.line_search import Prediction, Search, Trial, backtrack, whole_step

DELTA = 0.01
ABOVE = math.nextafter(DELTA, 1.0)
GOOD = Trial(loss=-1.0, kl=0.5 * DELTA, improvement=1.0)
AT_RADIUS = Trial(loss=-1.0, kl=DELTA, improvement=1.0)
BEYOND = Trial(loss=-1.0, kl=2 * DELTA, improvement=1.0)
JUST_BEYOND = Trial(loss=-1.0, kl=ABOVE, improvement=1.0)
WORSE = Trial(loss=1.0, kl=0.5 * DELTA, improvement=-1.0)
ODD = [math.nan, math.inf, -math.inf]


def settings(**changes: Any) -> Hyperparameters:
    defaults = TrustRegionOptimizer([torch.zeros(1)], max_kl=DELTA).defaults
    return Hyperparameters(**{**defaults, **changes})


def search(
    attempt: Callable[[float], Trial],
    *,
    promised: float = 1.0,
    predicted_kl: float = DELTA,
    **changes: Any,
) -> tuple[Search, list[float]]:
    """A backtracking search, and the scales that it tried."""
    scales: list[float] = []

    def recorded(scale: float) -> Trial:
        scales.append(scale)
        return attempt(scale)

    result = backtrack(recorded, Prediction(promised, predicted_kl), settings(**changes))
    return result, scales


def scripted(trials: Sequence[Trial]) -> Callable[[float], Trial]:
    """An attempt that says these things in turn, whatever the scale."""
    following = iter(trials)
    return lambda _: next(following)


def improving(kl: Callable[[float], float]) -> Callable[[float], Trial]:
    return lambda scale: Trial(loss=-scale, kl=kl(scale), improvement=scale)


@pytest.mark.parametrize("trial", [GOOD, BEYOND, WORSE])
def test_whole_step_accepts_whatever_is_finite(trial: Trial) -> None:
    result = whole_step(scripted([trial]), Prediction(1.0, DELTA), settings(mode="natural"))
    assert result == Search(Outcome.ACCEPTED, trial, 1.0, 0)


@pytest.mark.parametrize("value", ODD)
@pytest.mark.parametrize("place", ["loss", "kl"])
def test_whole_step_refuses_what_is_not_finite(place: str, value: float) -> None:
    trial = Trial(**{"loss": 0.0, "kl": 0.0, "improvement": 1.0, place: value})
    result = whole_step(scripted([trial]), Prediction(1.0, DELTA), settings(mode="natural"))
    assert result == Search(Outcome.NON_FINITE_TRIAL, trial, 1.0, 0)


def test_a_good_full_step_is_taken_after_one_trial() -> None:
    result, scales = search(scripted([GOOD]))
    assert result == Search(Outcome.ACCEPTED, GOOD, 1.0, 0)
    assert scales == [1.0]


@pytest.mark.parametrize("earlier", [[], [BEYOND], [WORSE], [BEYOND, WORSE], [WORSE, BEYOND]])
def test_kl_equal_to_the_radius_is_within_it_at_every_trial(earlier: list[Trial]) -> None:
    result, scales = search(scripted([*earlier, AT_RADIUS]))
    assert result == Search(Outcome.ACCEPTED, AT_RADIUS, scales[-1], len(earlier))
    refused, _ = search(scripted([*earlier, JUST_BEYOND]), max_backtracks=len(earlier))
    assert refused.outcome is Outcome.KL_ABOVE_RADIUS


QUADRATIC = [(lambda t, a=a: a * t**2, a) for a in (1.001, 1.5, 4.0, 100.0)]
CUBIC = [(lambda t, b=b: t**2 + b * t**3, 1.0) for b in (0.001, 0.5, 3.0, 100.0)]
QUARTIC = [(lambda t, c=c: t**2 + c * t**4, 1.0) for c in (0.001, 0.2, 0.6)]


@pytest.mark.parametrize(("kl", "predicted"), QUADRATIC + CUBIC + QUARTIC)
@pytest.mark.parametrize("backtrack_ratio", [0.1, 0.9])
def test_an_overshoot_is_shortened_to_just_below_the_radius_by_what_it_measured(
    kl: Callable[[float], float], predicted: float, backtrack_ratio: float
) -> None:
    result, scales = search(
        improving(lambda t: DELTA * kl(t)),
        predicted_kl=DELTA * predicted,
        backtrack_ratio=backtrack_ratio,
    )
    assert result.outcome is Outcome.ACCEPTED
    assert len(scales) == 2
    assert 0.9 * DELTA <= result.trial.kl <= DELTA


@pytest.mark.parametrize("factor", [2.0, 5.0, 50.0])
def test_a_second_overshoot_forgets_a_prediction_that_was_wrong(factor: float) -> None:
    result, scales = search(improving(lambda t: factor * DELTA * t**2))
    assert result.outcome is Outcome.ACCEPTED
    assert len(scales) == 3
    assert 0.9 * DELTA <= result.trial.kl <= DELTA


@pytest.mark.parametrize("ratio", [0.5, 0.8])
def test_too_little_improvement_multiplies_the_scale_by_the_ratio(ratio: float) -> None:
    result, scales = search(scripted([WORSE, WORSE, WORSE, GOOD]), backtrack_ratio=ratio)
    assert result.outcome is Outcome.ACCEPTED
    assert scales == pytest.approx([ratio**k for k in range(4)], rel=1e-15)


@pytest.mark.parametrize("backtracks", [0, 1, 4])
def test_the_demand_is_a_share_of_the_promise_for_this_scale_not_compounded(
    backtracks: int,
) -> None:
    share, promised, ratio = 0.25, 8.0, 0.5  # powers of two: the demand is exact
    demand = share * promised * ratio**backtracks
    earlier = [WORSE] * backtracks
    for improvement, outcome in (
        (demand, Outcome.ACCEPTED),
        (math.nextafter(demand, 0.0), Outcome.NO_IMPROVEMENT),
    ):
        result, _ = search(
            scripted([*earlier, Trial(-1.0, 0.0, improvement)]),
            promised=promised,
            improvement_ratio=share,
            backtrack_ratio=ratio,
            max_backtracks=backtracks,
        )
        assert result.outcome is outcome


@pytest.mark.parametrize(
    ("improvement", "outcome"),
    [
        (math.nextafter(0.0, 1.0), Outcome.ACCEPTED),
        (0.0, Outcome.NO_IMPROVEMENT),
        (-0.0, Outcome.NO_IMPROVEMENT),
        (-1e-9, Outcome.NO_IMPROVEMENT),
    ],
)
def test_without_a_demanded_share_the_improvement_must_still_be_positive(
    improvement: float, outcome: Outcome
) -> None:
    trial = Trial(0.0, 0.0, improvement)
    result, _ = search(scripted([trial]), improvement_ratio=0.0, max_backtracks=0)
    assert result.outcome is outcome


@pytest.mark.parametrize("earlier", [[], [BEYOND], [WORSE, BEYOND, WORSE]])
@pytest.mark.parametrize("place", ["loss", "kl"])
@pytest.mark.parametrize("value", ODD)
def test_a_trial_that_is_not_finite_ends_the_search(
    earlier: list[Trial], place: str, value: float
) -> None:
    odd = Trial(**{"loss": 0.0, "kl": 0.0, "improvement": 1.0, place: value})
    result, scales = search(scripted([*earlier, odd, GOOD]))
    assert result == Search(Outcome.NON_FINITE_TRIAL, odd, scales[-1], len(earlier))
    assert len(scales) == len(earlier) + 1


@pytest.mark.parametrize(
    ("last", "outcome"),
    [(BEYOND, Outcome.KL_ABOVE_RADIUS), (WORSE, Outcome.NO_IMPROVEMENT)],
)
@pytest.mark.parametrize("earlier", [[], [BEYOND, BEYOND], [WORSE], [WORSE, BEYOND, WORSE]])
def test_an_exhausted_search_says_why_its_last_trial_was_refused(
    last: Trial, outcome: Outcome, earlier: list[Trial]
) -> None:
    result, scales = search(scripted([*earlier, last]), max_backtracks=len(earlier))
    assert result == Search(outcome, last, scales[-1], len(earlier))
    assert len(scales) == len(earlier) + 1


def test_where_kl_and_improvement_both_fail_the_radius_is_the_reason() -> None:
    result, _ = search(scripted([Trial(1.0, ABOVE, -1.0)]), max_backtracks=0)
    assert result.outcome is Outcome.KL_ABOVE_RADIUS


COEFFICIENT = st.floats(min_value=0.0, max_value=1e4)


@hypothesis.settings(deadline=None)
@hypothesis.given(
    coefficients=st.tuples(COEFFICIENT, COEFFICIENT, COEFFICIENT, COEFFICIENT),
    ripple=st.floats(min_value=0.0, max_value=0.99),
    frequency=st.floats(min_value=0.0, max_value=100.0),
    bend=st.floats(min_value=-2.0, max_value=2.0),
    predicted_kl=st.floats(min_value=0.0, max_value=1.0),
    max_backtracks=st.integers(min_value=0, max_value=10),
    improvement_ratio=st.floats(min_value=0.0, max_value=0.9),
)
def test_whatever_the_kl_an_accepted_trial_lies_within_the_radius_and_improves(
    coefficients: tuple[float, float, float, float],
    ripple: float,
    frequency: float,
    bend: float,
    predicted_kl: float,
    max_backtracks: int,
    improvement_ratio: float,
) -> None:
    def attempt(scale: float) -> Trial:
        smooth = sum(c * scale**power for power, c in enumerate(coefficients, start=1))
        kl = DELTA * smooth * (1 + ripple * math.sin(frequency * scale))
        return Trial(loss=0.0, kl=kl, improvement=scale - bend * scale**2)

    result, scales = search(
        attempt,
        predicted_kl=predicted_kl,
        max_backtracks=max_backtracks,
        improvement_ratio=improvement_ratio,
    )
    assert len(scales) == result.backtracks + 1 <= max_backtracks + 1
    assert scales[0] == 1.0
    assert all(0 < later < earlier for earlier, later in itertools.pairwise(scales))
    assert result.scale == scales[-1]
    assert result.trial == attempt(result.scale)
    if result.outcome is Outcome.ACCEPTED:
        assert result.trial.kl <= DELTA
        assert result.trial.improvement > 0
        assert result.trial.improvement >= improvement_ratio * result.scale
    else:
        assert result.backtracks == max_backtracks
