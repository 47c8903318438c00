"""Where the line search aims next if the products are of a part of the batch."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
from test_aiming import EXACT, improving
from trials import DELTA, search

from trpo_optim import Outcome
from trpo_optim.algorithm.line_search import Trial


@pytest.mark.parametrize("factor", [1.3, 2.0, 5.0, 50.0])
@pytest.mark.parametrize("own", [0.0, 0.5, 0.79, 1.21, 3.0, -1e-9, math.inf, math.nan])
@pytest.mark.parametrize("constraint", ["mean", "max"])
def test_a_model_of_samples_with_another_kl_is_forgotten_at_once(
    factor: float, own: float, constraint: str
) -> None:
    def kl(scale: float) -> float:
        return factor * DELTA * scale**2

    def attempt(scale: float) -> Trial:
        mean = kl(scale) / (2 if constraint == "max" else 1)
        return Trial(-scale, mean, scale, largest_kl=kl(scale))

    result, scales = search(
        attempt,
        own_kl=lambda scale: own * attempt(scale).kl,
        predicted_kl=DELTA,
        constraint=constraint,
    )
    assert result.outcome is Outcome.ACCEPTED
    assert len(scales) == 2
    assert result.trial.largest_kl == pytest.approx(0.98 * DELTA)


@pytest.mark.parametrize(("max_backtracks", "asked"), [(0, []), (10, [1.0])])
def test_the_kl_of_other_samples_is_measured_once_and_only_for_a_further_trial(
    max_backtracks: int, asked: list[float]
) -> None:
    measured: list[float] = []

    def own_kl(scale: float) -> float:
        measured.append(scale)
        return DELTA

    kls = iter([5.0, 3.0, 2.0, 0.95])
    attempt = improving(lambda _: DELTA * next(kls))
    search(attempt, own_kl=own_kl, max_backtracks=max_backtracks)
    assert measured == asked


@pytest.mark.parametrize(("kl", "predicted", "trials"), EXACT)
def test_a_model_of_samples_with_the_same_kl_is_as_good_as_the_batchs(
    kl: Callable[[float], float], predicted: float, trials: int
) -> None:
    attempt = improving(lambda t: DELTA * kl(t))
    found = search(attempt, predicted_kl=DELTA * predicted, own_kl=lambda t: DELTA * kl(t))
    assert found == search(attempt, predicted_kl=DELTA * predicted)
    assert len(found[1]) <= trials
