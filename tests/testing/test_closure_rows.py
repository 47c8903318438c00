"""check_closure finds a KL that leaves out rows which the loss moves, or that has a factor."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from broken_closures import with_loss_inputs
from problems import Problem, categorical, gaussian
from token_closures import Tokens
from torch import Tensor
from torch.distributions import kl_divergence

from trpo_optim import sampled_kl
from trpo_optim.testing import Finding, Verdict, check_closure

pytestmark = pytest.mark.no_cover

ROWS = 64
MAKES = [gaussian, categorical]


def finding(problem: Problem, reduce: Callable[[Tensor], Tensor], *, third: bool) -> Finding:
    """Return what is found in a closure whose KL is made of the rows' KLs in some way."""

    def closure() -> Any:
        dist = problem.policy(problem.observations)
        ratio = (dist.log_prob(problem.actions) - problem.old_log_prob).exp()
        pair = -(ratio * problem.advantages).mean(), reduce(kl_divergence(problem.old, dist))
        return (*pair, dist) if third else pair

    report = check_closure(closure, problem.parameters(), **with_loss_inputs(problem))
    return report["kl scale"]


@pytest.mark.parametrize("third", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("make", MAKES)
@pytest.mark.parametrize(
    ("reduce", "kept"),
    [
        (lambda kl: kl[:16].mean(), 16),
        (lambda kl: kl[::2].mean(), 32),
        (lambda kl: kl[:-1].mean(), ROWS - 1),
        (lambda kl: kl[0], 1),
        (lambda kl: kl.max(), 1),
        (lambda kl: kl.topk(8).values.mean(), 8),
    ],
    ids=["a slice", "every other", "all but the last", "one row", "the largest", "the top"],
)
def test_a_kl_of_some_rows_is_found(
    reduce: Any, kept: int, make: Any, dtype: torch.dtype, third: bool
) -> None:
    found = finding(make(samples=ROWS, dtype=dtype), reduce, third=third)
    assert found.verdict is Verdict.FAILED
    assert f"on {kept} of the {ROWS} rows" in found.cause


@pytest.mark.parametrize("third", [False, True])
@pytest.mark.parametrize("make", MAKES)
@pytest.mark.parametrize("factor", [0.8, 1.1, 1.5])
def test_a_small_factor_is_found(factor: float, make: Any, third: bool) -> None:
    found = finding(make(samples=ROWS), lambda kl: factor * kl.mean(), third=third)
    assert found.verdict is Verdict.FAILED
    assert f"{factor:.4g} times the mean KL" in found.cause


@pytest.mark.parametrize("third", [False, True])
@pytest.mark.parametrize("make", MAKES)
@pytest.mark.parametrize("samples", [1, 2, ROWS, 4096])
def test_the_mean_over_all_rows_passes(make: Any, samples: int, third: bool) -> None:
    found = finding(make(samples=samples), Tensor.mean, third=third)
    assert found.verdict is Verdict.PASSED


@pytest.mark.parametrize("make", MAKES)
def test_rows_that_the_loss_leaves_out_need_no_kl(make: Any) -> None:
    problem = make(samples=ROWS)
    counted = torch.arange(ROWS) < 40

    def closure() -> Any:
        dist = problem.policy(problem.observations)
        ratio = (dist.log_prob(problem.actions) - problem.old_log_prob).exp()
        loss = -(ratio * problem.advantages)[counted].mean()
        return loss, kl_divergence(problem.old, dist)[counted].mean(), dist

    report = check_closure(closure, problem.parameters())
    assert report.passed, str(report)


def test_a_kl_of_another_evaluation_at_fewer_observations_is_found() -> None:
    problem = gaussian(samples=ROWS)

    def closure() -> Any:
        dist = problem.policy(problem.observations)
        ratio = (dist.log_prob(problem.actions) - problem.old_log_prob).exp()
        part: Any = problem.policy(problem.observations[:16])
        old: Any = problem.old
        of_part = torch.distributions.Independent(
            torch.distributions.Normal(old.base_dist.loc[:16], old.base_dist.scale[:16]), 1
        )
        return -(ratio * problem.advantages).mean(), kl_divergence(of_part, part).mean()

    options = with_loss_inputs(problem)
    found = check_closure(closure, problem.parameters(), **options)["kl scale"]
    assert found.verdict is Verdict.FAILED
    assert f"of 16 rows, and log_prob of {ROWS} actions" in found.cause


@pytest.mark.parametrize("samples", [ROWS, 1024])
def test_an_estimated_kl_covers_all_rows(samples: int) -> None:
    problem = gaussian(samples=samples)

    def closure() -> Any:
        dist = problem.policy(problem.observations)
        new = dist.log_prob(problem.actions)
        ratio = (new - problem.old_log_prob).exp()
        kl = sampled_kl(problem.old_log_prob, new, low_variance=True)
        return -(ratio * problem.advantages).mean(), kl, dist

    found = check_closure(closure, problem.parameters(), **with_loss_inputs(problem))["kl scale"]
    assert found.verdict is not Verdict.FAILED, str(found)


def test_a_kl_of_some_sequences_is_found() -> None:
    tokens = Tokens()

    def of_first(kl: Tensor) -> Tensor:
        mask = tokens.mask[:6]
        return (kl[:6] * mask).sum() / mask.sum()

    closure = tokens.closure(tokens.of_tokens, of_first)
    report = check_closure(closure, tokens.model.parameters(), **tokens.options())
    assert report["kl scale"].verdict is Verdict.FAILED, str(report)
    assert "leaves the others out" in report["kl scale"].cause
