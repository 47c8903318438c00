"""A mask that is true for prompts and padding, where responses are to count."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from language_model import Rollout
from token_closures import Tokens

from trpo_optim import Closures, TrustRegionError
from trpo_optim.testing import Verdict, check_closure
from trpo_optim.tokens import token_closures, token_log_prob

pytestmark = pytest.mark.usefixtures("flat_policies_pass")


def closures_of(tokens: Tokens, **options: Any) -> Closures:
    return token_closures(
        lambda rows: tokens.model(tokens.tokens[rows]).logits,
        tokens.chosen,
        ~tokens.mask,
        tokens.advantages,
        **options,
    )


@pytest.mark.parametrize("per", ["token", "sequence"])
@pytest.mark.parametrize("micro_batch", [None, 5])
def test_check_closure_says_that_the_loss_counts_what_the_mask_leaves_out(
    per: Any, micro_batch: int | None
) -> None:
    tokens = Tokens()
    closures = closures_of(tokens, per=per, micro_batch=micro_batch)
    finding = check_closure(closures, tokens.parameters(), **tokens.options())["loss"]
    assert finding.verdict is Verdict.FAILED
    assert f"over the {int((~tokens.mask).sum())} of 108 elements" in finding.cause
    assert "one of the two masks is inverted" in finding.cause


def test_check_closure_says_that_the_kl_counts_what_the_mask_leaves_out() -> None:
    tokens = Tokens()
    closure = tokens.closure(tokens.of_tokens, lambda kls: kls[~tokens.mask].mean())
    report = check_closure(closure, tokens.parameters(), **tokens.options())
    assert [each.check for each in report.failures] == ["kl scale"]
    assert "one of the two masks is inverted" in report["kl scale"].cause


@pytest.mark.parametrize("old", ["log_prob", "logits"])
@pytest.mark.parametrize("micro_batch", [None, 4])
def test_log_probabilities_of_0_at_all_tokens_that_count_are_an_error(
    old: Any, micro_batch: int | None
) -> None:
    rollout = Rollout()
    logits = rollout.logits(slice(None)).detach()
    behaviour = token_log_prob(logits, rollout.tokens, rollout.mask)
    counted = int((~rollout.mask).sum())
    options = {"behaviour_log_prob": behaviour, "old": old, "micro_batch": micro_batch}
    arguments = (rollout.logits, rollout.tokens % logits.shape[-1])
    with pytest.raises(TrustRegionError, match=rf"is 0 at all {counted} tokens.*is inverted"):
        token_closures(*arguments, ~rollout.mask, rollout.advantages, **options)
    assert token_closures(*arguments, rollout.mask, rollout.advantages, **options).parts


def test_a_policy_that_was_and_is_certain_of_its_tokens_is_none_of_these() -> None:
    """In float32 the logarithm of a probability just below 1 is 0."""
    logits = torch.tensor([0.0, 20.0]).expand(3, 4, 2)
    tokens = torch.ones(3, 4, dtype=torch.long)
    behaviour = token_log_prob(logits, tokens)
    assert not behaviour.any()
    for present in (20.0, 1.0):  # now, or some steps later: ln π is −0.31
        seen = torch.tensor([0.0, present], requires_grad=True)
        assert token_closures(
            lambda rows, seen=seen: seen.expand(3, 4, 2),  # type: ignore[misc]  # no type for a default
            tokens,
            None,
            torch.randn(3),
            behaviour_log_prob=behaviour,
        ).parts
