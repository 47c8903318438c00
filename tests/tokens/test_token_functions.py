"""What the function that gives logits may return, and how."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from language_model import PROMPT, Rollout, both, evaluated
from torch import Tensor

from trpo_optim import TrustRegionError, TrustRegionOptimizer
from trpo_optim.tokens import chunked_log_prob, token_closures

TORCH_FUNC_SERVES = torch.__version__ >= "2.7"
"""What writes in place under its transforms is refused by older ones."""

pytestmark = pytest.mark.usefixtures("flat_policies_pass")


def after_a_step(function: Callable[[Rollout, Any], Tensor]) -> Tensor:
    """Return the parameters after a step on what a function returns for rows."""
    rollout = Rollout()
    closures = token_closures(
        partial(function, rollout), rollout.tokens, rollout.mask, rollout.advantages
    )
    report = TrustRegionOptimizer(rollout.parameters, engine="Gauss-Newton").step(closures)
    assert report.accepted
    return torch.cat([each.detach().flatten() for each in rollout.parameters])


def test_log_probabilities_in_chunks_take_the_step_of_the_logits() -> None:
    def in_chunks(rollout: Rollout, rows: Any) -> Tensor:
        hidden, head = rollout.model.hidden(rollout.whole[rows][:, :-1]), rollout.model.head
        return chunked_log_prob(hidden, head, rollout.tokens[rows], rollout.mask[rows], chunk=5)

    torch.testing.assert_close(
        after_a_step(in_chunks), after_a_step(Rollout.logits), rtol=0, atol=1e-8
    )


@pytest.mark.parametrize("old", ["log_prob", "logits", 3])
def test_a_temperature_in_place_in_the_function_is_that_of_the_option(old: Any) -> None:
    rollout = Rollout()
    engines: list[Any] = [
        *(["torch.func"] if TORCH_FUNC_SERVES else []),
        "double backward",
        "Gauss-Newton",
        "finite differences",
        "auto",
    ]
    expected = both(
        rollout,
        token_closures(
            rollout.logits,
            rollout.tokens,
            rollout.mask,
            rollout.advantages,
            old=old,
            temperature=0.7,
        ),
    )
    closures = token_closures(
        lambda rows: rollout.logits(rows).div_(0.7),
        rollout.tokens,
        rollout.mask,
        rollout.advantages,
        old=old,
    )
    for ours, theirs in zip(both(rollout, closures), expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-12)
    for engine in engines:
        report = TrustRegionOptimizer(rollout.parameters, engine=engine).step(
            token_closures(
                lambda rows: rollout.logits(rows).div_(0.7),
                rollout.tokens,
                rollout.mask,
                rollout.advantages,
                old=old,
            )
        )
        assert report.accepted, report


def test_only_the_logits_of_the_response_are_enough() -> None:
    """As a function with ``logits_to_keep`` returns them, one more than there are tokens."""
    rollout = Rollout()
    kept = rollout.whole.shape[1] - PROMPT
    response, mask = rollout.whole[:, PROMPT:], rollout.mask[:, PROMPT - 1 :]

    def last(rows: Any, count: int) -> Tensor:
        hidden = rollout.model.hidden(rollout.whole[rows])[:, -count:]
        result: Tensor = rollout.model.head(hidden)
        return result

    closures = token_closures(
        lambda rows: last(rows, kept + 1)[:, :-1], response, mask, rollout.advantages
    )
    expected = both(
        rollout, token_closures(rollout.logits, rollout.tokens, rollout.mask, rollout.advantages)
    )
    for ours, theirs in zip(both(rollout, closures), expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-12)
    with pytest.raises(TrustRegionError, match=r"\(9, 7, 8\).*\(9, 6\).*logits\[:, :-1\]"):
        token_closures(lambda rows: last(rows, kept + 1), response, mask, rollout.advantages)


def test_log_probabilities_in_half_precision_give_a_loss_and_a_kl_in_single() -> None:
    torch.manual_seed(0)
    logs, tokens = -torch.rand(8, 4).bfloat16(), torch.zeros(8, 4, dtype=torch.long)
    change, advantages = torch.zeros((), requires_grad=True), torch.randn(8)
    closures = token_closures(
        lambda rows: (logs.float() - change).bfloat16()[rows], tokens, None, advantages
    )
    with torch.no_grad():
        change += 0.1
    loss, kl, _ = evaluated(closures)
    log_ratio = (logs.float() - 0.1).bfloat16().double() - logs.double()
    gain = (log_ratio.exp() * advantages[:, None]).mean()
    assert loss.item() == pytest.approx(-gain.item(), rel=1e-4)
    assert kl.item() == pytest.approx((log_ratio.exp() - 1 - log_ratio).mean().item(), rel=1e-4)
