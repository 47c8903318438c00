"""The report, its outcomes, and the error for misuse."""

from __future__ import annotations

import copy
import dataclasses
import json
import math
import pickle
import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from problems import PROBLEMS, Problem

from trpo_optim import Outcome, StepReport, TrustRegionError

FLOATS = (
    "loss_before",
    "loss_after",
    "improvement",
    "predicted_improvement",
    "kl",
    "predicted_kl",
    "step_scale",
    "step_norm",
    "gradient_norm",
    "curvature",
    "cg_residual",
)
COUNTS = ("cg_iterations", "backtracks", "closure_evaluations", "fisher_products")
FIELDS = tuple(entry.name for entry in dataclasses.fields(StepReport))

REJECTIONS = [outcome for outcome in Outcome if outcome is not Outcome.ACCEPTED]

each_outcome = pytest.mark.parametrize("outcome", Outcome, ids=lambda outcome: outcome.name)


def full_report(outcome: Outcome = Outcome.ACCEPTED) -> StepReport:
    """A report with a value of its own in every field."""
    figures: dict[str, Any] = {}
    for i, entry in enumerate(dataclasses.fields(StepReport), start=7):
        if entry.init and entry.name != "outcome":
            kind: Any = type(entry.default)
            figures[entry.name] = kind(i)
    return StepReport(outcome, **figures)


@each_outcome
def test_accepted_follows_from_the_outcome(outcome: Outcome) -> None:
    assert StepReport(outcome).accepted is (outcome is Outcome.ACCEPTED)


def test_accepted_cannot_be_given() -> None:
    contradiction: dict[str, Any] = {"accepted": True}
    with pytest.raises(TypeError, match="accepted"):
        StepReport(Outcome.NO_IMPROVEMENT, **contradiction)


@pytest.mark.parametrize("name", FIELDS)
def test_no_field_can_be_changed(name: str) -> None:
    report = full_report()
    with pytest.raises(dataclasses.FrozenInstanceError):
        setattr(report, name, getattr(report, name))


def test_as_dict_holds_every_field_by_name_with_its_value() -> None:
    report = full_report()
    values = report.as_dict()
    assert values.keys() == set(FIELDS) >= {"outcome", "accepted", *FLOATS, *COUNTS}
    assert values["outcome"] == "ACCEPTED"
    for name in FIELDS:
        if name != "outcome":
            assert values[name] == getattr(report, name)


@each_outcome
def test_as_dict_is_flat_and_survives_json(outcome: Outcome) -> None:
    values = full_report(outcome).as_dict()
    assert {type(value) for value in values.values()} == {float, int, bool, str}
    assert json.loads(json.dumps(values)) == values


def test_an_unreached_figure_is_nan_and_an_unreached_count_zero() -> None:
    report = StepReport(Outcome.NON_FINITE_LOSS)
    moved = {"improvement", "step_scale", "step_norm"}
    assert all(math.isnan(getattr(report, name)) for name in FLOATS if name not in moved)
    assert all(getattr(report, name) == 0 for name in (*moved, *COUNTS))


@pytest.mark.parametrize(
    "copied",
    [copy.deepcopy, copy.copy, lambda report: pickle.loads(pickle.dumps(report))],
    ids=["deepcopy", "copy", "pickle"],
)
def test_copies_are_equal_and_keep_the_outcome_itself(
    copied: Callable[[StepReport], StepReport],
) -> None:
    report = full_report(Outcome.NO_IMPROVEMENT)
    twin = copied(report)
    assert twin == report
    assert twin.outcome is Outcome.NO_IMPROVEMENT
    assert twin.accepted is False


@each_outcome
def test_every_outcome_is_made_of_sentences(outcome: Outcome) -> None:
    assert re.fullmatch(r"[A-Za-z].*\.", outcome.value)
    assert "  " not in outcome.value


@pytest.mark.parametrize("outcome", REJECTIONS, ids=lambda outcome: outcome.name)
def test_every_rejection_says_that_nothing_moved_and_names_a_remedy(outcome: Outcome) -> None:
    assert re.search("unchanged|withdrawn", outcome.value)
    *_, remedy = re.split(r"(?<=\.) ", outcome.value)
    assert re.match("(Look|Check|Lower|Raise|Bound) ", remedy)


def huge_loss(problem: Problem) -> Callable[[], tuple[torch.Tensor, torch.Tensor]]:
    def closure() -> tuple[torch.Tensor, torch.Tensor]:
        loss, kl = problem.closure()
        return 1e160 * loss, kl

    return closure


@pytest.mark.parametrize("mode", ["trpo", "natural"])
@pytest.mark.parametrize("make", PROBLEMS)
def test_a_figure_beyond_every_float_is_infinite_and_the_step_as_ever(
    make: Callable[[], Problem], mode: str
) -> None:
    plain, huge = make(), make()
    plain_report = plain.optimizer(mode=mode).step(plain.closure)
    report = huge.optimizer(mode=mode).step(huge_loss(huge))
    assert report.accepted
    assert report.curvature == math.inf
    assert report.improvement == pytest.approx(1e160 * plain_report.improvement)
    assert report.kl == pytest.approx(plain_report.kl)
    torch.testing.assert_close(huge.vector(), plain.vector(), rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("damping", [0.1, 1e12])
@pytest.mark.parametrize("make", PROBLEMS)
def test_a_step_that_a_huge_loss_makes_huge_is_withdrawn(
    make: Callable[[], Problem], damping: float
) -> None:
    problem = make()
    before = problem.vector()
    optimizer = problem.optimizer(mode="natural", max_kl=None, damping=damping)
    assert optimizer.step(huge_loss(problem)).outcome is Outcome.NON_FINITE_TRIAL
    assert torch.equal(problem.vector(), before)


def test_the_error_for_misuse_is_a_value_error() -> None:
    assert issubclass(TrustRegionError, ValueError)
