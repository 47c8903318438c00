"""Hyperparameters and closures of every kind: an error of the package's own, or a right step."""

from __future__ import annotations

import math
import random
from collections.abc import Callable
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
import torch
from problems import MODES, Problem, Snapshot, gaussian
from profiles import problems
from torch import Tensor

from trpo_optim import StepReport, TrustRegionError, TrustRegionOptimizer
from trpo_optim.hyperparameters import Hyperparameters

pytestmark = pytest.mark.no_cover

VALUES: list[Callable[[random.Random], Any]] = [
    lambda source: source.choice([None, True, False, "", "trpo", "0.01", b"x", object(), Ellipsis]),
    lambda source: source.choice([math.nan, math.inf, -math.inf, -0.0, 1e-320, 1e308, 10**400]),
    lambda source: source.choice([[], {}, (), [0.5], {"mode": "trpo"}, int, lambda: 0.5]),
    lambda source: source.choice([1j, Fraction(1, 3), np.float32(0.3), np.int64(3), np.nan]),
    lambda source: torch.tensor(source.choice([0.5, 3, math.nan])),
    lambda source: source.uniform(-2, 2),
    lambda source: 10 ** source.uniform(-12, 6),
    lambda source: source.randint(-3, 200),
]

RESULTS: dict[str, Callable[[Tensor, Tensor, Problem], Any]] = {
    "nothing": lambda loss, kl, problem: None,
    "one value": lambda loss, kl, problem: loss,
    "four values": lambda loss, kl, problem: (loss, kl, kl, kl),
    "empty": lambda loss, kl, problem: (),
    "a dict": lambda loss, kl, problem: {"loss": loss, "kl": kl},
    "floats": lambda loss, kl, problem: (loss.item(), kl.item()),
    "an array": lambda loss, kl, problem: (loss, np.asarray(0.0)),
    "complex": lambda loss, kl, problem: (loss + 0j, kl),
    "whole numbers": lambda loss, kl, problem: (loss, kl.round().long()),
    "a truth": lambda loss, kl, problem: (loss > 0, kl),
    "a matrix": lambda loss, kl, problem: (loss, kl.expand(2, 2)),
    "a vector of losses": lambda loss, kl, problem: (loss.expand(5), kl),
    "no elements": lambda loss, kl, problem: (loss, kl.expand(0)),
    "on meta": lambda loss, kl, problem: (loss.to("meta"), kl),
    "sparse": lambda loss, kl, problem: (loss.reshape(1).to_sparse(), kl),
    "detached": lambda loss, kl, problem: (loss.detach(), kl),
    "a detached kl": lambda loss, kl, problem: (loss, kl.detach()),
    "swapped": lambda loss, kl, problem: (kl, loss),
    "an entropy": lambda loss, kl, problem: (loss, kl + 1.7),
    "a kl that is nothing": lambda loss, kl, problem: (loss, 0 * kl),
    "a string for a third": lambda loss, kl, problem: (loss, kl, "dist"),
    "a class for a third": lambda loss, kl, problem: (loss, kl, Tensor),
    "an empty third": lambda loss, kl, problem: (loss, kl, ()),
    "another third": lambda loss, kl, problem: (loss, kl, torch.randn(3)),
    "parameters for a third": lambda loss, kl, problem: (loss, kl, problem.parameters()),
    "another precision": lambda loss, kl, problem: (loss.float(), kl),
    "half precision": lambda loss, kl, problem: (loss, kl.bfloat16()),
    "one kl a sample": lambda loss, kl, problem: (loss, kl.expand(7)),
    "a huge loss": lambda loss, kl, problem: (1e300 * loss, kl),
    "a tiny loss": lambda loss, kl, problem: (1e-300 * loss, kl),
    "a shifted loss": lambda loss, kl, problem: (loss + 1e6, kl),
    "a list": lambda loss, kl, problem: [loss, kl],
    "NaN": lambda loss, kl, problem: (loss * math.nan, kl),
    "infinite": lambda loss, kl, problem: (loss, kl + math.inf),
}

SOUND = {
    *("another precision", "one kl a sample", "a huge loss", "a tiny loss", "a list"),
    *("another third", "parameters for a third"),
}
"""Where the step is that of the closure itself."""


def is_told(error: TrustRegionError | None, name: str, value: Any) -> bool:
    """Return whether an error names a hyperparameter and its value, or what it does not go with."""
    text = str(error)
    values = [repr(value), f"{value:g}" if isinstance(value, float) else "-"]
    said = any(each in text for each in values) or "mode" in text
    return any(each in text for each in (name, "lr", "max_kl")) and said and len(text) > 40


def attempted(step: Callable[[], StepReport]) -> tuple[StepReport | None, TrustRegionError | None]:
    """Return a step's report, or the error."""
    try:
        return step(), None
    except TrustRegionError as error:
        return None, error


def test_any_value_of_a_hyperparameter_is_named_in_an_error_or_gives_a_safe_step() -> None:
    source = random.Random(28)
    taken = 0
    count = max(40, problems())
    for _ in range(count):
        name = source.choice(Hyperparameters.names())
        value = source.choice(VALUES)(source)
        mode = source.choice(list(MODES))
        problem = gaussian(samples=16)
        before = Snapshot.of(problem.policy)
        settings = {"mode": mode, "cg_iterations": 2, "lr": 0.5, name: value}

        def step(settings: Any = settings, problem: Problem = problem) -> StepReport:
            return TrustRegionOptimizer(problem.parameters(), **settings).step(problem.closure)

        report, error = attempted(step)
        if report is None or not report.accepted:
            assert before.differences(Snapshot.of(problem.policy)) == []
        if report is None:
            assert is_told(error, name, value), (name, value, str(error))
            continue
        taken += 1
        if report.accepted and settings["mode"] == "trpo":
            assert report.kl <= settings.get("max_kl", 0.01)
            assert report.improvement > 0
    assert taken > count / 20


@pytest.mark.filterwarnings("ignore:Converting a tensor")
@pytest.mark.parametrize("name", RESULTS)
@pytest.mark.parametrize("mode", MODES)
def test_whatever_a_closure_returns_is_an_error_with_a_remedy_or_a_right_step(
    name: str, mode: str
) -> None:
    problem, plain = gaussian(), gaussian()
    before = Snapshot.of(problem.policy)
    settings = {"mode": mode, "max_kl": 0.5} if name == "half precision" else {"mode": mode}
    optimizer = problem.optimizer(**settings)
    report, error = attempted(
        lambda: optimizer.step(lambda: RESULTS[name](*problem.closure(), problem))
    )
    if report is None or not report.accepted:
        assert before.differences(Snapshot.of(problem.policy)) == []
    if report is None:
        assert name not in SOUND
        assert len(str(error)) > 60
    elif name in SOUND and not (mode == "vanilla" and name in ("a huge loss", "a tiny loss")):
        plain.optimizer(**settings).step(plain.closure)
        torch.testing.assert_close(problem.vector(), plain.vector(), rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("mode", MODES)
def test_whatever_is_given_for_a_closure_is_named(mode: str) -> None:
    problem = gaussian()
    optimizer = problem.optimizer(mode=mode)
    before = Snapshot.of(problem.policy)
    given: Any
    for given in (None, 3, "closure", [], [None], problem.closure(), {}, [problem.closure, 2], b""):
        with pytest.raises(TrustRegionError) as caught:
            optimizer.step(given)
        assert "closure" in str(caught.value)
        assert before.differences(Snapshot.of(problem.policy)) == []
