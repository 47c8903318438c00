"""The surrogate and the reference KL of tokens, beside enumeration over a vocabulary."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.autograd.functional import jacobian

from trpo_optim import TrustRegionError
from trpo_optim.tokens import reference_kl, token_surrogate

VOCABULARY = 8


def policies() -> tuple[Tensor, Tensor, Tensor]:
    """Logits of the new policy; log-probabilities of the reference and the behaviour policy."""
    torch.manual_seed(0)
    new, reference, behaviour = torch.randn(3, VOCABULARY, dtype=torch.float64)
    return new, reference.log_softmax(-1), behaviour.log_softmax(-1)


def expectation(terms: Callable[[int], Tensor], behaviour: Tensor) -> Tensor:
    """Return the mean of what each token gives, weighted by its probability."""
    return torch.stack([terms(token) for token in range(VOCABULARY)]) @ behaviour.exp()


def kl(left: Tensor, right: Tensor) -> Tensor:
    return (left.exp() * (left - right)).sum()


def test_the_reference_kl_and_its_gradient_are_exact_in_expectation() -> None:
    logits, reference, behaviour = policies()

    def estimate(logits: Tensor) -> Tensor:
        new = logits.log_softmax(-1)

        def of(token: int) -> Tensor:
            one = slice(token, token + 1)
            return reference_kl(new[one], reference[one], behaviour[one])

        return expectation(of, behaviour)

    def exact(logits: Tensor) -> Tensor:
        return kl(logits.log_softmax(-1), reference)

    for ours, theirs in (
        (estimate, exact),
        (
            lambda x: jacobian(estimate, x, create_graph=True),
            lambda x: jacobian(exact, x, create_graph=True),
        ),
    ):
        torch.testing.assert_close(ours(logits), theirs(logits), rtol=0, atol=1e-10)


@pytest.mark.parametrize("name", ["no weight, -ln ρ", "no weight, ρ - 1 - ln ρ", "constant weight"])
def test_the_usual_estimators_have_another_gradient(name: str) -> None:
    """Where the new policy drew the tokens, as at the first step on a rollout."""
    logits, reference, _ = policies()
    behaviour = logits.log_softmax(-1)

    def usual(logits: Tensor) -> Tensor:
        new = logits.log_softmax(-1)
        log_rho, weight = reference - new, (new - behaviour).exp().detach()
        terms = {
            "no weight, -ln ρ": -log_rho,
            "no weight, ρ - 1 - ln ρ": log_rho.expm1() - log_rho,
            "constant weight": weight * (log_rho.expm1() - log_rho),
        }
        return (behaviour.exp() * terms[name]).sum()

    def exact(logits: Tensor) -> Tensor:
        return kl(logits.log_softmax(-1), reference)

    torch.testing.assert_close(usual(logits), exact(logits), rtol=0, atol=1e-12)
    expected, found = jacobian(exact, logits), jacobian(usual, logits)
    assert (found - expected).norm() > 0.5 * expected.norm()
    if name == "no weight, -ln ρ":
        assert found.norm() < 1e-12
    else:
        of_other_kl = jacobian(lambda x: kl(reference, x.log_softmax(-1)), logits)
        torch.testing.assert_close(found, of_other_kl, rtol=0, atol=1e-12)


def test_the_surrogate_is_exact_in_expectation() -> None:
    logits, _, behaviour = policies()
    new, advantages = logits.log_softmax(-1), torch.randn(VOCABULARY, dtype=torch.float64)

    def of(token: int) -> Tensor:
        one = slice(token, token + 1)
        return token_surrogate(new[one], behaviour[one], advantages[one])

    exact = -(new.exp() * advantages).sum()
    torch.testing.assert_close(expectation(of, behaviour), exact, rtol=0, atol=1e-12)


def padded() -> dict[str, Tensor]:
    """Log-probabilities and advantages with padding that is no number."""
    torch.manual_seed(0)
    mask = torch.tensor([[1, 1, 0], [1, 0, 0], [0, 0, 0], [1, 1, 1]]).bool()
    new, behaviour, reference, advantages = torch.randn(4, 4, 3, dtype=torch.float64)
    return {
        "new": (-new.abs()).masked_fill(~mask, -math.inf),
        "behaviour": (-behaviour.abs()).masked_fill(~mask, -1e6),
        "reference": (-reference.abs()).masked_fill(~mask, math.nan),
        "advantages": advantages.masked_fill(~mask, math.nan),
        "mask": mask,
    }


@pytest.mark.parametrize("per", ["token", "sequence"])
def test_the_mean_is_over_tokens_or_over_sums_of_sequences(per: Any) -> None:
    given = padded()
    new, mask = given["new"].requires_grad_(), given["mask"]
    pair = (
        token_surrogate(new, given["behaviour"], given["advantages"], mask, per=per),
        reference_kl(new, given["reference"], given["behaviour"], mask, per=per),
    )
    counted = 6 if per == "token" else 3
    sums = [0.0, 0.0]
    for row, place in mask.nonzero().tolist():
        log_new, log_behaviour, log_reference, advantage = (
            float(given[name][row, place].detach())
            for name in ("new", "behaviour", "reference", "advantages")
        )
        weight = math.exp(log_new - log_behaviour)
        rho = math.exp(log_reference - log_new)
        sums[0] -= weight * advantage / counted
        sums[1] += weight * (rho - 1 - math.log(rho)) / counted
    for value, expected in zip(pair, sums, strict=True):
        assert value.item() == pytest.approx(expected, abs=1e-12)
        (slope,) = torch.autograd.grad(value, new)
        assert torch.equal(slope == 0, ~mask)


def test_one_advantage_per_sequence_counts_for_each_of_its_tokens() -> None:
    given = padded()
    of_sequences = torch.randn(4, dtype=torch.float64)
    of_tokens = of_sequences[:, None].expand(4, 3)
    values = [
        token_surrogate(given["new"], given["behaviour"], each, given["mask"]).item()
        for each in (of_sequences, of_tokens)
    ]
    assert values[0] == values[1] != 0


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"behaviour_log_prob": torch.zeros(4, 2)}, ["behaviour_log_prob", "(4, 2)", "(4, 3)"]),
        ({"advantages": torch.zeros(3)}, ["advantages", "(3,)", "(4, 3)"]),
        ({"behaviour_log_prob": torch.zeros(4, 3, requires_grad=True)}, ["requires grad"]),
        ({"mask": torch.ones(4)}, ["mask", "(4,)"]),
        ({"per": "batch"}, ["'batch'"]),
    ],
)
def test_what_does_not_fit_is_an_error(change: dict[str, Any], words: list[str]) -> None:
    given: dict[str, Any] = {
        "new_log_prob": torch.zeros(4, 3),
        "behaviour_log_prob": torch.zeros(4, 3),
        "advantages": torch.zeros(4),
    }
    with pytest.raises(TrustRegionError) as error:
        token_surrogate(**given | change)
    assert all(word in str(error.value) for word in words), error.value
