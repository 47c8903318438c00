"""Log-probabilities of the present policy that the caller has already computed."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from language_model import VOCABULARY, Rollout
from torch import Tensor

from trpo_optim import Closures, StepReport, TrustRegionError, TrustRegionOptimizer
from trpo_optim.tokens import token_closures, token_log_prob

BEHAVIOUR = {"the present policy drew the tokens": None, "another one did": -2.0}


class Counted(Rollout):
    """A rollout that counts how often its model is evaluated."""

    evaluations = 0

    def logits(self, rows: Any = slice(None)) -> Tensor:
        """Return what predicts ``tokens[rows]``, (n, T, V)."""
        self.evaluations += 1
        return super().logits(rows)

    def hidden(self, rows: Any) -> Tensor:
        """Return the hidden states below the head, (n, T, H)."""
        self.evaluations += 1
        return self.model.hidden(self.whole[rows][:, :-1])


def closures_of(rollout: Counted, *, head: bool = False, **options: Any) -> Closures:
    outputs = rollout.hidden if head else rollout.logits
    if head:
        options |= {"head": rollout.model.head, "chunk": 7}
    return token_closures(outputs, rollout.tokens, rollout.mask, rollout.advantages, **options)


def log_prob_of(rollout: Counted) -> Tensor:
    with torch.no_grad():
        return token_log_prob(rollout.logits(), rollout.tokens, rollout.mask)


def step(rollout: Counted, **options: Any) -> StepReport:
    return TrustRegionOptimizer(rollout.parameters).step(closures_of(rollout, **options))


@pytest.mark.parametrize("behaviour", BEHAVIOUR.values(), ids=BEHAVIOUR)
@pytest.mark.parametrize("head", [False, True])
@pytest.mark.parametrize("curvature", [0.5, 1.0])
@pytest.mark.parametrize("per", ["token", "sequence"])
def test_they_give_the_same_step_without_an_evaluation(
    behaviour: float | None, head: bool, curvature: float, per: Any
) -> None:
    ends = []
    for given in (False, True):
        rollout = Counted()
        options: dict[str, Any] = {"curvature": curvature, "per": per, "micro_batch": 3}
        options |= {"head": head}
        if behaviour is not None:
            options["behaviour_log_prob"] = torch.full(rollout.tokens.shape, behaviour).double()
        if given:
            options["old_log_prob"] = log_prob_of(rollout)
        rollout.evaluations = 0
        closures = closures_of(rollout, **options)
        assert (rollout.evaluations == 0) == given
        report = TrustRegionOptimizer(rollout.parameters).step(closures)
        assert report.accepted
        ends.append(torch.cat([each.detach().flatten() for each in rollout.parameters]))
    torch.testing.assert_close(ends[0], ends[1], rtol=0, atol=1e-10)


def test_those_of_an_earlier_policy_are_named_by_the_step() -> None:
    rollout = Counted()
    earlier = log_prob_of(rollout)
    rollout.move()
    before = [each.detach().clone() for each in rollout.parameters]
    with pytest.raises(TrustRegionError, match=r"not about zero|inference server"):
        step(rollout, old_log_prob=earlier)
    assert all(map(torch.equal, before, rollout.parameters))


@pytest.mark.parametrize("old", ["logits", 3])
def test_an_exact_kl_needs_more_than_them(old: Any) -> None:
    rollout = Counted()
    with pytest.raises(TrustRegionError, match=r"old_log_prob is given and old is .*leave"):
        closures_of(rollout, old=old, old_log_prob=log_prob_of(rollout))


WRONG = {
    "a shape": (lambda given: given[:, 1:], r"old_log_prob has shape \(10, 7\)"),
    "NaN": (lambda given: given * torch.nan, "old_log_prob is nan at token"),
    "a graph": (lambda given: given.requires_grad_(), "old_log_prob requires grad"),
    "probabilities": (lambda given: given.exp(), "old_log_prob holds .*Pass ln π"),
}


@pytest.mark.parametrize(("change", "message"), WRONG.values(), ids=WRONG)
def test_what_they_cannot_be_is_named(change: Any, message: str) -> None:
    rollout = Counted()
    with pytest.raises(TrustRegionError, match=message):
        closures_of(rollout, old_log_prob=change(log_prob_of(rollout)))


def test_a_token_that_the_model_does_not_have_is_named_by_the_step() -> None:
    rollout = Counted()
    given = log_prob_of(rollout)
    rollout.tokens[rollout.mask.nonzero()[0].tolist()[0]] = VOCABULARY
    closures = token_closures(
        lambda rows: rollout.model(rollout.whole[rows][:, :-1].clamp(max=VOCABULARY - 1)),
        rollout.tokens,
        rollout.mask,
        rollout.advantages,
        old_log_prob=given,
    )
    with pytest.raises(TrustRegionError, match=f"The tokens hold {VOCABULARY}"):
        TrustRegionOptimizer(rollout.parameters).step(closures)
