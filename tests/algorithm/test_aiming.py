"""Where the line search aims next: just inside the radius, by what it has measured."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable

import pytest
from trials import AT_RADIUS, BEYOND, DELTA, GOOD, JUST_BEYOND, WORSE, scripted, search

from trpo_optim import Outcome
from trpo_optim.algorithm.line_search import Search, Trial

FEEBLE = Trial(loss=-1.0, kl=0.98 * DELTA, improvement=1e-3)
NEARER = Trial(loss=-1.0, kl=0.7 * DELTA, improvement=1.0)
ROUNDED = Trial(loss=-1.0, kl=-1e-12, improvement=1.0)


def improving(kl: Callable[[float], float]) -> Callable[[float], Trial]:
    return lambda scale: Trial(loss=-scale, kl=kl(scale), improvement=scale)


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


# KLs in units of the radius: the first trial lands, overshoots, or falls far short of it.
KLS = [lambda t: t**2, lambda t: t**2 + t**4, lambda t: 0.5 * t**2 + 0.1 * t**3]


@pytest.mark.parametrize("kl", KLS)
@pytest.mark.parametrize("lr", [0.99, 0.9, 0.5, 0.1, 1e-3, 1e-200])
def test_lr_multiplies_the_step_that_fills_the_radius(
    kl: Callable[[float], float], lr: float
) -> None:
    attempt = improving(lambda t: DELTA * kl(t))
    whole, scales = search(attempt, predicted_kl=DELTA)
    part, tried = search(attempt, predicted_kl=DELTA, lr=lr)
    assert whole.outcome is part.outcome is Outcome.ACCEPTED
    assert tried == [*scales, part.scale]
    assert part == Search(
        Outcome.ACCEPTED, attempt(lr * whole.scale), lr * whole.scale, len(scales)
    )


@pytest.mark.parametrize("lr", [1.0, 2.0, 1e300])
def test_lr_above_one_takes_the_step_that_fills_the_radius(lr: float) -> None:
    attempt = improving(lambda t: DELTA * t**2)
    assert search(attempt, predicted_kl=DELTA, lr=lr) == search(attempt, predicted_kl=DELTA)


def test_without_further_trials_lr_multiplies_the_first_one() -> None:
    for lr in (1.0, 0.5):
        _, scales = search(
            improving(lambda t: 0.1 * DELTA * t**2), predicted_kl=DELTA, lr=lr, max_backtracks=0
        )
        assert scales == [lr * math.sqrt(0.97)]


@pytest.mark.parametrize(
    ("refused", "outcome"),
    [(BEYOND, Outcome.KL_ABOVE_RADIUS), (WORSE, Outcome.NO_IMPROVEMENT)],
)
def test_a_part_that_lr_asks_for_and_that_does_not_serve_is_shortened(
    refused: Trial, outcome: Outcome
) -> None:
    trials = [AT_RADIUS, refused, refused, GOOD]
    result, scales = search(scripted(trials), lr=0.5, backtrack_ratio=0.8, max_backtracks=3)
    assert result == Search(Outcome.ACCEPTED, GOOD, scales[-1], 3)
    assert scales == pytest.approx([1.0, 0.5, 0.4, 0.32])
    result, _ = search(scripted(trials), lr=0.5, max_backtracks=2)
    assert (result.outcome, result.backtracks) == (outcome, 2)


def test_a_part_that_lr_asks_for_and_that_is_not_finite_is_not_taken() -> None:
    odd = Trial(math.nan, 0.0, 1.0)
    result, scales = search(scripted([AT_RADIUS, odd]), lr=0.5)
    assert result == Search(Outcome.NON_FINITE_TRIAL, odd, 0.5, 1)
    assert scales == [1.0, 0.5]


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


@pytest.mark.parametrize("bend", [0.1, 3.0, 60.0, 1e3])
@pytest.mark.parametrize("factor", [5.0, 100.0])
def test_a_kl_that_bends_down_is_aimed_by_a_logarithm(bend: float, factor: float) -> None:
    def kl(scale: float) -> float:
        return factor * DELTA * math.log1p(bend * scale**2) / math.log1p(bend)

    result, scales = search(improving(kl))
    assert result.outcome is Outcome.ACCEPTED
    assert result.trial.kl == pytest.approx(0.98 * DELTA)
    assert len(scales) == 3


def test_between_two_trials_a_kl_that_bends_down_is_aimed_by_a_logarithm() -> None:
    kls = [10.0, 7.0, 0.85, 0.95]
    trials = [Trial(-1.0, DELTA * kl, 1.0 + index) for index, kl in enumerate(kls)]
    result, scales = search(scripted(trials), own_kl=lambda _: 0.0)
    assert result == Search(Outcome.ACCEPTED, trials[-1], scales[-1], 3)
    _, beyond, short, last = scales
    assert short < last < beyond
    assert kls[2] / short**2 > kls[1] / beyond**2  # it bends down

    def curve(bend: float, scale: float) -> float:
        return 7.0 * math.log1p(bend * scale**2) / math.log1p(bend * beyond**2)

    low, high = 1e-6, 1e9  # the more it bends, the higher it is at the short trial
    for _ in range(200):
        middle = math.sqrt(low * high)
        low, high = (low, middle) if curve(middle, short) > 0.85 else (middle, high)
    assert curve(low, short) == pytest.approx(0.85)
    assert curve(low, last) == pytest.approx(0.98)


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
