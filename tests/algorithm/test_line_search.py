"""Which trial the line search takes, and what it says where it takes none."""

from __future__ import annotations

import math

import hypothesis
import pytest
import torch
from hypothesis import strategies as st
from trials import (
    ABOVE,
    AT_RADIUS,
    BEYOND,
    DELTA,
    GOOD,
    JUST_BEYOND,
    WORSE,
    scripted,
    search,
    settings,
)

from trpo_optim import Outcome, TrustRegionOptimizer
from trpo_optim.algorithm.line_search import Prediction, Search, Trial, whole_step

FULL = Trial(loss=-1.0, kl=0.95 * DELTA, improvement=1.0)
ODD = [math.nan, math.inf, -math.inf]


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


@pytest.mark.parametrize("earlier", [[], [BEYOND], [WORSE], [BEYOND, WORSE], [WORSE, BEYOND]])
def test_kl_equal_to_the_radius_is_within_it_at_every_trial(earlier: list[Trial]) -> None:
    result, scales = search(scripted([*earlier, AT_RADIUS]))
    assert result == Search(Outcome.ACCEPTED, AT_RADIUS, scales[-1], len(earlier))
    refused, _ = search(scripted([*earlier, JUST_BEYOND]), max_backtracks=len(earlier))
    assert refused.outcome is Outcome.KL_ABOVE_RADIUS


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
