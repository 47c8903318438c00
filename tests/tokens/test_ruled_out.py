"""Tokens that a policy rules out, and numbers that are no logarithms of probabilities."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from language_model import Rollout
from torch import Tensor

from trpo_optim import TrustRegionError, TrustRegionOptimizer
from trpo_optim.tokens import group_advantages, reference_kl, token_closures, token_log_prob


class Banning(Rollout):
    """A rollout of a policy that has ruled out one of the drawn tokens since."""

    def __init__(self) -> None:
        super().__init__()
        self.banned = self.mask.nonzero()[0].tolist()
        with torch.no_grad():
            self.behaviour = token_log_prob(super().logits(), self.tokens, self.mask)

    def logits(self, rows: Any = slice(None)) -> Tensor:
        """Return what predicts ``tokens[rows]``, (n, T, V)."""
        bans = torch.zeros(*self.tokens.shape, super().logits().shape[-1])
        row, place = self.banned
        bans[row, place, self.tokens[row, place]] = -math.inf
        return super().logits(rows) + bans[rows]

    def closures(self, **options: Any) -> Any:
        """Return the closures on all tokens."""
        return token_closures(self.logits, self.tokens, self.mask, self.advantages, **options)


@pytest.mark.parametrize("old", ["log_prob", "logits"])
@pytest.mark.parametrize("weight", [0.0, 0.1])
def test_a_token_of_another_policy_that_is_ruled_out_has_the_ratio_zero(
    old: Any, weight: float
) -> None:
    rollout = Banning()
    options: dict[str, Any] = {"behaviour_log_prob": rollout.behaviour, "old": old}
    if weight:
        options |= {"reference_log_prob": rollout.behaviour, "reference_weight": weight}
    closures = rollout.closures(**options)
    loss, _, *_ = closures()
    probabilities = rollout.logits().detach().softmax(-1)
    expected, count = 0.0, int(rollout.mask.sum())
    for row, place in rollout.mask.nonzero().tolist():
        p = float(probabilities[row, place, rollout.tokens[row, place]])
        b = math.exp(float(rollout.behaviour[row, place]))
        assert (p == 0) == ([row, place] == rollout.banned)
        expected -= p / b * float(rollout.advantages[row].mean()) / count
        kl = 1.0 - p / b - p / b * math.log(b / p) if p else 1.0
        expected += weight * kl / count
    assert float(loss.detach()) == pytest.approx(expected, rel=1e-5)
    assert TrustRegionOptimizer(rollout.parameters).step(closures).accepted


def test_a_reference_kl_counts_what_the_new_policy_rules_out() -> None:
    new = torch.tensor([0.7, 0.3, 0.0]).log().requires_grad_()
    reference = torch.tensor([0.5, 0.3, 0.2]).log()
    drew = torch.tensor([1 / 3, 1 / 3, 1 / 3]).log()  # every token of the vocabulary once
    kl = reference_kl(new, reference, drew)
    assert float(kl.detach()) == pytest.approx(0.7 * math.log(0.7 / 0.5), rel=1e-5)
    (slope,) = torch.autograd.grad(kl, [new])
    assert slope[:2].isfinite().all()
    assert slope[2] == 0


def test_a_drawn_token_that_the_present_policy_rules_out_is_an_error() -> None:
    with pytest.raises(TrustRegionError, match=r"rules out 1 of the \d+ tokens.*behaviour_log"):
        Banning().closures()


@pytest.mark.parametrize("given", [False, True])
def test_negative_log_likelihoods_are_refused(given: bool) -> None:
    rollout = Rollout()
    old = token_log_prob(rollout.logits(), rollout.tokens).detach() if given else None
    with pytest.raises(TrustRegionError, match=r"outputs\(rows\) holds .*at most 0"):
        token_closures(
            lambda rows: -token_log_prob(rollout.logits(rows), rollout.tokens[rows]),
            rollout.tokens,
            rollout.mask,
            rollout.advantages,
            old_log_prob=old,
        )()


def test_given_log_probabilities_of_tokens_that_the_policy_rules_out_are_an_error() -> None:
    rollout = Banning()
    with pytest.raises(TrustRegionError, match=r"rules out 1 of the \d+ tokens"):
        rollout.closures(old_log_prob=rollout.behaviour)()


def test_counts_may_be_numpys() -> None:
    closures = []
    for number in (int, np.int64):
        rollout = Rollout()
        options: dict[str, Any] = {"micro_batch": number(3), "old": number(6)}
        made = token_closures(
            rollout.logits, rollout.tokens, rollout.mask, rollout.advantages, **options
        )
        closures.append(TrustRegionOptimizer(rollout.parameters).step(made))
    assert closures[0] == closures[1]
    rewards = torch.tensor([1.0, 0.0])
    given: Any = np.int64(2)
    assert torch.equal(group_advantages(rewards, given), torch.tensor([1.0, -1.0]))
