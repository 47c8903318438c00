"""The report, its outcomes, and the error for misuse."""

from __future__ import annotations

import copy
import dataclasses
import json
import math
import pickle
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from problems import PROBLEMS, Problem, gaussian
from torch.utils.tensorboard import SummaryWriter

from trpo_optim import Outcome, StepReport, TrustRegionError
from trpo_optim.hyperparameters import Hyperparameters

FLOATS = (
    "loss_before",
    "loss_after",
    "improvement",
    "predicted_improvement",
    "kl",
    "predicted_kl",
    "step_scale",
    "step_norm",
    "rounded_away",
    "gradient_norm",
    "curvature",
    "cg_residual",
)
COUNTS = ("cg_iterations", "backtracks", "closure_evaluations", "fisher_products")
TEXTS = {"outcome", "engine", "fallback"}
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


def test_as_dict_holds_every_figure_by_name_with_its_value() -> None:
    report = full_report()
    values = report.as_dict()
    assert values.keys() == set(FIELDS) - TEXTS >= {"accepted", *FLOATS, *COUNTS}
    for name, value in values.items():
        assert value == getattr(report, name)


@each_outcome
def test_as_dict_survives_json_and_loggers(outcome: Outcome, tmp_path: Path) -> None:
    report = full_report(outcome)
    values = report.as_dict()
    assert {type(value) for value in values.values()} == {float, int}
    assert json.loads(json.dumps(values, allow_nan=False)) == values
    with SummaryWriter(str(tmp_path)) as writer:
        for name, value in values.items():
            writer.add_scalar(name, value)


def test_as_dict_leaves_out_what_is_not_finite() -> None:
    report = StepReport(Outcome.NON_FINITE_LOSS, loss_before=math.nan, curvature=math.inf, kl=0.0)
    values = report.as_dict()
    assert not {"loss_before", "curvature", "max_kl"} & values.keys()
    assert values["kl"] == 0.0
    assert values["accepted"] == 0


@pytest.mark.parametrize(
    ("settings", "line"),
    [
        (
            {},
            r"accepted: KL 0\.009\d of 0\.01, loss change -0\.\d+, \d trials, 10 .*, torch\.func",
        ),
        (
            {"mode": "vanilla", "lr": 1e-3},
            r"accepted: KL \S+, loss change -\S+, 1 trial, autograd",
        ),
        ({"lr": 0.0}, r"zero learning rate: 10 products, torch\.func"),
        (
            {"max_kl": 3.0, "max_backtracks": 0},
            r"kl above radius: KL \S+ of 3, loss change \S+, 1 trial, 10 products, torch\.func",
        ),
    ],
)
def test_as_a_string_it_is_one_line(settings: dict[str, Any], line: str) -> None:
    problem = gaussian()
    report = problem.optimizer(cg_tolerance=0.0, **settings).step(problem.closure)
    assert re.fullmatch(line, str(report))


@each_outcome
def test_the_longest_line_is_shorter_than_120_characters(outcome: Outcome) -> None:
    huge = -1.2345e-300
    figures: dict[str, Any] = dict.fromkeys(("trial_kl", "trial_loss", "loss_before"), huge)
    report = StepReport(
        outcome,
        **{**figures, "loss_before": 1.0},
        max_kl=1.2345e-300,
        backtracks=100,
        fisher_products=10**6,
        engine="double backward",
        rounded_away=1.0,
    )
    assert len(str(report)) < 120
    assert "\n" not in str(report)
    assert str(StepReport(outcome)) == outcome.value.replace("_", " ")


@pytest.mark.parametrize("outcome", Outcome)
def test_outcomes_are_pickled_by_their_names_and_not_by_their_messages(outcome: Outcome) -> None:
    data = pickle.dumps(outcome)
    assert outcome.value.encode() in data
    assert outcome.message.encode() not in data
    assert pickle.loads(data) is outcome


def test_pickles_of_later_versions_load() -> None:
    """Which may know further hyperparameters and figures."""
    optimizer = gaussian().optimizer(max_kl=0.02)
    optimizer.defaults["memory"] = optimizer.param_groups[0]["memory"] = 3
    report = full_report()
    object.__setattr__(report, "memory", 3.0)
    optimizer.last_report = report
    twin = pickle.loads(pickle.dumps(optimizer))
    assert twin.last_report.kl == report.kl
    assert twin.param_groups[0]["max_kl"] == 0.02


@pytest.mark.parametrize("name", [entry.name for entry in dataclasses.fields(Hyperparameters)])
def test_a_pickle_without_a_hyperparameter_gets_its_default(name: str) -> None:
    optimizer = gaussian().optimizer()
    del optimizer.defaults[name], optimizer.param_groups[0][name]
    twin = pickle.loads(pickle.dumps(optimizer))
    default = getattr(Hyperparameters(), name)
    assert twin.param_groups[0][name] == twin.defaults[name] == default


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
    assert re.fullmatch(r"[A-Za-z].*\.", outcome.message)
    assert "  " not in outcome.message
    assert outcome.value == outcome.name.lower()


@pytest.mark.parametrize("outcome", REJECTIONS, ids=lambda outcome: outcome.name)
def test_every_rejection_says_that_nothing_moved_and_names_a_remedy(outcome: Outcome) -> None:
    assert re.search("unchanged|withdrawn", outcome.message)
    *_, remedy = re.split(r"(?<=\.) ", outcome.message)
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
