"""check_closure takes what step takes, and looks at every closure."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from broken_closures import with_loss_inputs
from micro_batches import UNEVEN, lengths, on_rows
from problems import Problem, gaussian
from token_closures import STEPS, Tokens
from torch.distributions import Categorical, kl_divergence

from trpo_optim import Closures
from trpo_optim.testing import ClosureReport, Verdict, check_closure
from trpo_optim.tokens import token_closures

pytestmark = pytest.mark.no_cover

Values = tuple[Any, ...]


def checked(closures: Any, problem: Problem, **options: Any) -> ClosureReport:
    return check_closure(closures, problem.parameters(), **options)


@pytest.mark.parametrize("third", [False, True])
@pytest.mark.parametrize("held", [False, True], ids=["a list", "Closures"])
def test_micro_batches_pass_as_the_whole_batch_does(third: bool, held: bool) -> None:
    problem = gaussian()
    closures: Any = [on_rows(problem, rows, third=third) for rows in UNEVEN]
    report = checked(
        Closures(closures, lengths(UNEVEN)) if held else closures,
        problem,
        **(with_loss_inputs(problem) if held else {}),
    )
    assert report.passed, report
    assert report["kl scale"].figures == {
        "kl over mean of rows": pytest.approx(1.0, rel=1e-6),
        "rows": 64.0,
    }
    if held:
        assert report["loss"].figures["cosine"] == pytest.approx(1.0, rel=1e-9)
        assert report["values"].figures["loss"] == pytest.approx(problem.closure()[0].item())


@pytest.mark.parametrize("micro_batch", [None, 5])
@pytest.mark.parametrize("old", ["log_prob", "logits"])
def test_closures_of_tokens_are_told_of_the_engine_that_serves_them(
    micro_batch: int | None, old: Any
) -> None:
    tokens = Tokens()
    closures = token_closures(
        lambda rows: tokens.model(tokens.tokens[rows]).logits,
        tokens.chosen,
        tokens.mask,
        tokens.advantages,
        old=old,
        micro_batch=micro_batch,
    )
    report = check_closure(closures, tokens.parameters(), **tokens.options())
    assert report.passed, report
    assert ("for micro-batches" in report["second order"].cause) == (micro_batch is not None)
    assert "third value" not in str(report)


def of_the_second(change: Callable[[Values], Values]) -> Callable[[Problem], list[Any]]:
    """Return what makes closures of which the second has a fault."""

    def closures(problem: Problem) -> list[Any]:
        first, second, third = (
            on_rows(problem, rows, third=True) for rows in (slice(8), slice(8, 40), slice(40, 64))
        )
        return [first, lambda: change(second()), third]

    return closures


FAULTS: dict[str, tuple[str, str, Callable[[Values], Values]]] = {
    "a KL that is summed": (
        "kl scale",
        "summed over the batch of 32",
        lambda values: (values[0], 32 * values[1], values[2]),
    ),
    "a detached loss": (
        "values",
        "is detached",
        lambda values: (values[0].detach(), *values[1:]),
    ),
    "a loss of NaN": (
        "values",
        "is not a number",
        lambda values: (values[0] * float("nan"), *values[1:]),
    ),
    "a KL beside zero": (
        "zero kl",
        "KL is 0.01 at the current parameters",
        lambda values: (values[0], values[1] + 0.01, values[2]),
    ),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_in_one_of_several_closures_is_found_and_the_closure_named(fault: str) -> None:
    check, cause, change = FAULTS[fault]
    problem = gaussian()
    report = checked(of_the_second(change)(problem), problem)
    assert report[check].verdict is Verdict.FAILED
    assert report[check].cause.startswith("In closure 2 of 3: ")
    assert cause in report[check].cause
    assert checked(of_the_second(lambda values: values)(problem), problem).passed


def test_a_closure_of_several_that_draws_a_new_batch_is_named() -> None:
    problem, calls = gaussian(), list[None]()

    def change(values: Values) -> Values:
        calls.append(None)
        return values[0] * len(calls), *values[1:]

    finding = checked(of_the_second(change)(problem), problem)["deterministic"]
    assert finding.verdict is Verdict.FAILED
    assert finding.cause.startswith("In closure 2 of 3: Two calls")


def test_the_curvatures_own_closure_is_checked_too() -> None:
    problem = gaussian()

    def shifted() -> Values:
        loss, kl = on_rows(problem, slice(8))()
        return loss, kl + 0.01

    finding = checked(Closures([problem.closure], curvature=shifted), problem)["zero kl"]
    assert finding.verdict is Verdict.FAILED
    assert finding.cause.startswith("In curvature: ")


def test_closures_that_read_the_loops_last_value_fail() -> None:
    problem = gaussian()
    closures = []
    for rows in UNEVEN:
        inner = on_rows(problem, rows)
        closures.append(lambda: inner())  # noqa: B023 (the mistake)
    report = checked(closures, problem)
    assert [finding.verdict for finding in report.findings] == [Verdict.FAILED]
    assert "Closures 1 and 2 of 4 are one function" in report.findings[0].cause


@pytest.mark.parametrize("padding", [False, True])
def test_a_mask_over_the_whole_batch_belongs_to_the_closures_in_their_order(padding: bool) -> None:
    tokens = Tokens()
    mask = torch.ones_like(tokens.mask) if padding else tokens.mask  # what the KL counts

    def on(rows: slice) -> Callable[[], Values]:
        old = Categorical(logits=tokens.old.logits[rows])

        def closure() -> Values:
            new = tokens.model(tokens.tokens[rows])
            chosen, counted = tokens.chosen[rows], tokens.mask[rows]
            ratio = (new.log_prob(chosen) - old.log_prob(chosen)).exp()
            loss = -(ratio * tokens.advantages[rows, None])[counted].mean()
            return loss, kl_divergence(old, new)[mask[rows]].mean(), new

        return closure

    pieces = [slice(0, 5), slice(5, 12)]
    closures = Closures([on(rows) for rows in pieces], [int(tokens.mask[r].sum()) for r in pieces])
    report = check_closure(closures, tokens.parameters(), **tokens.options())
    assert report["loss"].verdict is Verdict.PASSED
    if padding:
        left_out = int((~tokens.mask[:5]).sum())
        assert report["kl scale"].cause == (
            "In closure 1 of 2: The closure's KL is averaged over prompt or padding: "
            f"{left_out} of {5 * STEPS} elements that the mask leaves out count."
        )
    else:
        assert report.passed, report


def test_a_loss_of_wrong_sign_is_found_in_micro_batches() -> None:
    problem = gaussian()

    def on(rows: slice) -> Callable[[], Values]:
        loss_and_kl = on_rows(problem, rows)
        return lambda: (-loss_and_kl()[0], loss_and_kl()[1])

    closures = Closures([on(rows) for rows in UNEVEN], lengths(UNEVEN))
    finding = checked(closures, problem, **with_loss_inputs(problem))["loss"]
    assert finding.verdict is Verdict.FAILED
    assert "its sign is wrong" in finding.cause
