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
from trpo_optim.algorithm.line_search import Prediction, Search, Trial, backtrack, whole_step
from trpo_optim.hyperparameters import Hyperparameters

DELTA = 0.01
ABOVE = math.nextafter(DELTA, 1.0)
PREDICTED = 0.97 * DELTA  # the most that does not shorten the first trial
FULL = Trial(loss=-1.0, kl=0.95 * DELTA, improvement=1.0)
GOOD = Trial(loss=-1.0, kl=0.5 * DELTA, improvement=1.0)
AT_RADIUS = Trial(loss=-1.0, kl=DELTA, improvement=1.0)
BEYOND = Trial(loss=-1.0, kl=2 * DELTA, improvement=1.0)
JUST_BEYOND = Trial(loss=-1.0, kl=ABOVE, improvement=1.0)
WORSE = Trial(loss=1.0, kl=0.5 * DELTA, improvement=-1.0)
FEEBLE = Trial(loss=-1.0, kl=0.98 * DELTA, improvement=1e-3)
NEARER = Trial(loss=-1.0, kl=0.7 * DELTA, improvement=1.0)
ROUNDED = Trial(loss=-1.0, kl=-1e-12, improvement=1.0)
ODD = [math.nan, math.inf, -math.inf]


def settings(**changes: Any) -> Hyperparameters:
    defaults = TrustRegionOptimizer([torch.zeros(1)], max_kl=DELTA).defaults
    return Hyperparameters(**{**defaults, **changes})


def search(
    attempt: Callable[[float], Trial],
    *,
    promised: float = 1.0,
    predicted_kl: float = PREDICTED,
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
    result, scales = search(scripted([FULL]))
    assert result == Search(Outcome.ACCEPTED, FULL, 1.0, 0)
    assert scales == [1.0]


@pytest.mark.parametrize(
    ("predicted", "first"), [(0.0, 1.0), (0.25, 1.0), (0.97, 1.0), (1.0, 0.97), (4.0, 0.97 / 4)]
)
def test_the_first_trial_aims_just_inside_the_radius_by_the_model(
    predicted: float, first: float
) -> None:
    _, scales = search(scripted([AT_RADIUS]), predicted_kl=predicted * DELTA)
    assert scales == [pytest.approx(math.sqrt(first))]


def test_a_first_trial_far_inside_the_radius_is_lengthened_by_what_it_measured() -> None:
    result, scales = search(improving(lambda t: 0.7 * DELTA * t**2), predicted_kl=DELTA)
    assert result.outcome is Outcome.ACCEPTED
    assert scales == [pytest.approx(math.sqrt(0.97)), pytest.approx(math.sqrt(1.4))]
    assert result.trial.kl == pytest.approx(0.98 * DELTA)


def test_a_first_trial_is_lengthened_once_and_at_most_to_twice_its_length() -> None:
    result, scales = search(improving(lambda t: 1e-3 * DELTA * t**2))
    assert scales == [1.0, 2.0]
    assert (result.outcome, result.scale) == (Outcome.ACCEPTED, 2.0)


def test_a_kl_that_stays_at_zero_is_no_reason_to_go_on() -> None:
    result, scales = search(improving(lambda _: 0.0))
    assert (result.outcome, scales) == (Outcome.ACCEPTED, [1.0, 2.0])


def test_a_negative_kl_is_within_the_radius_and_no_reason_to_go_further() -> None:
    negative = Trial(loss=-1.0, kl=-0.2 * DELTA, improvement=1.0)
    result, scales = search(scripted([negative]))
    assert (result, scales) == (Search(Outcome.ACCEPTED, negative, 1.0, 0), [1.0])


@pytest.mark.parametrize("share", [0.01, 0.25])
def test_what_lr_asks_for_is_not_lengthened_to_the_radius(share: float) -> None:
    result, scales = search(improving(lambda t: share * DELTA * t**2), predicted_kl=share * DELTA)
    assert (result.outcome, scales) == (Outcome.ACCEPTED, [1.0])


@pytest.mark.parametrize("second", [WORSE, FEEBLE, Trial(-1.0, 0.95 * DELTA, 0.9)])
def test_where_going_further_does_not_improve_more_the_first_trial_is_taken(
    second: Trial,
) -> None:
    result, scales = search(scripted([GOOD, second]))
    assert result == Search(Outcome.ACCEPTED, GOOD, 1.0, 1)
    assert scales[1] > 1


def test_where_going_further_leaves_the_radius_the_next_trial_lies_between() -> None:
    result, scales = search(scripted([GOOD, BEYOND, AT_RADIUS]))
    assert result == Search(Outcome.ACCEPTED, AT_RADIUS, scales[2], 2)
    assert scales[0] < scales[2] < scales[1]


@pytest.mark.parametrize("earlier", [[], [BEYOND], [WORSE], [BEYOND, WORSE], [WORSE, BEYOND]])
def test_kl_equal_to_the_radius_is_within_it_at_every_trial(earlier: list[Trial]) -> None:
    result, scales = search(scripted([*earlier, AT_RADIUS]))
    assert result == Search(Outcome.ACCEPTED, AT_RADIUS, scales[-1], len(earlier))
    refused, _ = search(scripted([*earlier, JUST_BEYOND]), max_backtracks=len(earlier))
    assert refused.outcome is Outcome.KL_ABOVE_RADIUS


# A KL in units of the radius, its quadratic term, and the most trials that it may take.
EXACT = [
    *((lambda t, a=a: a * t**2, a, 2) for a in (1.001, 1.5, 4.0, 100.0)),
    *((lambda t, b=b: t**2 * math.exp(b * t), 1.0, 2) for b in (0.001, 1.0, 10.0, 100.0)),
]
CUBIC = [
    (lambda t, b=b: t**2 + b * t**3, 1.0, trials)
    for b, trials in ((0.001, 2), (0.5, 2), (3.0, 3), (30.0, 4), (100.0, 5))
]
QUARTIC = [
    (lambda t, c=c: t**2 + c * t**4, 1.0, trials)
    for c, trials in ((0.001, 2), (0.2, 2), (0.6, 2), (3.0, 3), (30.0, 3), (100.0, 4))
]
EXPONENTIAL = [
    *((lambda t, b=b: math.expm1(b * t**2) / b, 1.0, 4) for b in (0.1, 1.0, 3.0)),
    *((lambda t, b=b: 2 * (math.expm1(b * t) / b - t) / b, 1.0, 4) for b in (0.1, 3.0, 100.0)),
]


@pytest.mark.parametrize(("kl", "predicted", "trials"), EXACT + CUBIC + QUARTIC + EXPONENTIAL)
@pytest.mark.parametrize("backtrack_ratio", [0.1, 0.9])
def test_an_overshoot_is_shortened_to_just_below_the_radius_by_what_it_measured(
    kl: Callable[[float], float], predicted: float, trials: int, backtrack_ratio: float
) -> None:
    result, scales = search(
        improving(lambda t: DELTA * kl(t)),
        predicted_kl=DELTA * predicted,
        backtrack_ratio=backtrack_ratio,
    )
    assert result.outcome is Outcome.ACCEPTED
    assert len(scales) <= trials
    assert 0.9 * DELTA <= result.trial.kl <= DELTA
    if (kl, predicted, trials) in EXACT and len(scales) > 1:
        assert result.trial.kl == pytest.approx(0.98 * DELTA)


@pytest.mark.parametrize("factor", [2.0, 5.0, 50.0])
def test_a_second_overshoot_forgets_a_prediction_that_was_wrong(factor: float) -> None:
    result, scales = search(improving(lambda t: factor * DELTA * t**2))
    assert result.outcome is Outcome.ACCEPTED
    assert len(scales) == 3
    assert 0.9 * DELTA <= result.trial.kl <= DELTA


@pytest.mark.parametrize("kl", [1e3, 1e10, 1e38, 1e300])
def test_a_huge_kl_that_never_falls_ends_the_search_by_at_most_hundredfold_cuts(kl: float) -> None:
    attempt = improving(lambda _: kl)
    result, scales = search(attempt, max_backtracks=100)
    last = scales[-1]
    assert result == Search(Outcome.KL_ABOVE_RADIUS, attempt(last), last, 100)
    cuts = [later / earlier for earlier, later in itertools.pairwise(scales)]
    assert len(cuts) == 100
    assert all(0.01 * (1 - 1e-12) <= cut < 1 for cut in cuts)
    assert cuts[-1] == pytest.approx(0.01)


@pytest.mark.parametrize("earlier", [[WORSE], [BEYOND, WORSE]])
def test_without_an_overshoot_just_before_a_low_kl_is_no_reason_to_aim_again(
    earlier: list[Trial],
) -> None:
    result, scales = search(scripted([*earlier, GOOD]))
    assert result == Search(Outcome.ACCEPTED, GOOD, scales[-1], len(earlier))


def test_after_an_overshoot_a_trial_below_nine_tenths_of_the_radius_is_aimed_again() -> None:
    enough = Trial(-1.0, 0.9 * DELTA, 1.0)
    result, scales = search(scripted([BEYOND, enough]), predicted_kl=DELTA)
    assert result == Search(Outcome.ACCEPTED, enough, scales[1], 1)
    less = Trial(-1.0, math.nextafter(0.9 * DELTA, 0.0), 1.0)
    result, scales = search(scripted([BEYOND, less, AT_RADIUS]), predicted_kl=DELTA)
    assert result == Search(Outcome.ACCEPTED, AT_RADIUS, scales[2], 2)
    assert scales[1] < scales[2] < scales[0]


def test_an_aim_between_a_short_trial_and_an_overshoot_is_by_these_two() -> None:
    result, scales = search(scripted([BEYOND, NEARER, JUST_BEYOND, AT_RADIUS]))
    assert result == Search(Outcome.ACCEPTED, AT_RADIUS, scales[3], 3)
    _, short, above, between = scales
    assert short < between < above
    steep = math.log(JUST_BEYOND.kl / NEARER.kl * (short / above) ** 2) / (above - short)
    predicted = JUST_BEYOND.kl * (between / above) ** 2 * math.exp(steep * (between - above))
    assert predicted == pytest.approx(0.98 * DELTA)


@pytest.mark.parametrize(
    ("trials", "taken"),
    [
        ([BEYOND, GOOD, WORSE], 1),
        ([BEYOND, GOOD, FEEBLE], 1),
        ([BEYOND, GOOD, BEYOND, WORSE], 1),
        ([BEYOND, ROUNDED, WORSE], 1),
        ([WORSE, BEYOND, GOOD, WORSE], 2),
        ([BEYOND, GOOD, NEARER, WORSE], 2),
    ],
)
def test_where_the_next_aim_improves_too_little_the_short_trial_is_taken(
    trials: list[Trial], taken: int
) -> None:
    result, scales = search(scripted(trials))
    assert result == Search(Outcome.ACCEPTED, trials[taken], scales[taken], len(trials) - 1)


@pytest.mark.parametrize(
    ("trials", "taken"),
    [
        ([BEYOND, GOOD], 1),
        ([BEYOND, GOOD, BEYOND], 1),
        ([BEYOND, GOOD, BEYOND, JUST_BEYOND], 1),
        ([BEYOND, GOOD, NEARER], 2),
    ],
)
def test_where_the_trials_run_out_the_last_short_one_is_taken(
    trials: list[Trial], taken: int
) -> None:
    result, scales = search(scripted(trials), max_backtracks=len(trials) - 1)
    assert result == Search(Outcome.ACCEPTED, trials[taken], scales[taken], len(trials) - 1)


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


@pytest.mark.parametrize(
    "earlier",
    [[], [BEYOND], [WORSE, BEYOND, WORSE], [BEYOND, GOOD], [BEYOND, GOOD, BEYOND]],
)
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


@hypothesis.given(
    coefficients=st.tuples(COEFFICIENT, COEFFICIENT, COEFFICIENT, COEFFICIENT),
    ripple=st.floats(min_value=0.0, max_value=0.99),
    frequency=st.floats(min_value=0.0, max_value=100.0),
    jump=st.floats(min_value=0.0, max_value=100.0),
    place=st.floats(min_value=0.0, max_value=1.0),
    bend=st.floats(min_value=-2.0, max_value=2.0),
    predicted_kl=st.floats(min_value=0.0, max_value=1.0),
    max_backtracks=st.integers(min_value=0, max_value=10),
    improvement_ratio=st.floats(min_value=0.0, max_value=0.9),
)
def test_whatever_the_kl_an_accepted_trial_lies_within_the_radius_and_improves(
    coefficients: tuple[float, float, float, float],
    ripple: float,
    frequency: float,
    jump: float,
    place: float,
    bend: float,
    predicted_kl: float,
    max_backtracks: int,
    improvement_ratio: float,
) -> None:
    def attempt(scale: float) -> Trial:
        smooth = sum(c * scale**power for power, c in enumerate(coefficients, start=1))
        kl = DELTA * smooth * (1 + ripple * math.sin(frequency * scale)) + jump * (scale > place)
        return Trial(loss=0.0, kl=kl, improvement=scale - bend * scale**2)

    result, scales = search(
        attempt,
        predicted_kl=predicted_kl,
        max_backtracks=max_backtracks,
        improvement_ratio=improvement_ratio,
    )
    assert len(scales) == result.backtracks + 1 <= max_backtracks + 1
    assert scales[0] == min(1.0, math.sqrt(0.97 * DELTA / max(predicted_kl, 1e-9)))
    assert result.trial == attempt(result.scale)
    longest, good = math.inf, []
    for scale in scales:
        trial = attempt(scale)
        improves = trial.improvement > 0 and trial.improvement >= improvement_ratio * scale
        assert 0 < scale < longest  # nothing is tried beyond what was refused
        if trial.kl <= DELTA and improves:
            good.append(scale)
        else:
            longest = scale
    if result.outcome is Outcome.ACCEPTED:
        assert result.scale in good
        assert result.trial.improvement == max(attempt(scale).improvement for scale in good)
        assert all(attempt(scale).kl < 0.9 * DELTA for scale in good[:-1])
    else:
        assert good == []
        assert result.scale == scales[-1]
        assert result.backtracks == max_backtracks


def test_after_a_fall_back_the_parameters_lie_where_the_report_says() -> None:
    weight = torch.zeros(2, dtype=torch.float64, requires_grad=True)
    full_step = torch.tensor([0.6, 0.8], dtype=torch.float64)  # at max_kl = 0.5

    def closure() -> tuple[torch.Tensor, torch.Tensor]:
        square = weight.square().sum()
        return 4 * square**4 - full_step @ weight, 0.5 * square * (1 + square**4)

    def attempt(scale: float) -> Trial:
        improvement = scale - 4 * scale**8
        return Trial(-improvement, 0.5 * scale**2 * (1 + scale**8), improvement)

    expected, scales = search(attempt, predicted_kl=0.5, max_kl=0.5)
    assert len(scales) == 3
    assert expected == Search(Outcome.ACCEPTED, attempt(scales[1]), scales[1], 2)

    report = TrustRegionOptimizer([weight], max_kl=0.5).step(closure)
    assert report.accepted
    assert report.backtracks == 2
    assert report.step_scale == pytest.approx(expected.scale)
    assert report.step_norm == pytest.approx(report.step_scale)
    torch.testing.assert_close(weight.detach(), report.step_scale * full_step)
    with torch.no_grad():
        loss, kl = closure()
    assert (report.loss_after, report.kl) == (loss.item(), kl.item())
    assert report.improvement == report.loss_before - report.loss_after


@pytest.mark.parametrize("value", ODD)
@pytest.mark.parametrize("place", ["loss", "kl"])
def test_a_longer_trial_that_is_not_finite_leaves_the_first_one_taken(
    place: str, value: float
) -> None:
    odd = Trial(**{"loss": 0.0, "kl": 0.0, "improvement": 1.0, place: value})
    result, scales = search(scripted([GOOD, odd]), predicted_kl=DELTA)
    assert result == Search(Outcome.ACCEPTED, GOOD, scales[0], 1)
