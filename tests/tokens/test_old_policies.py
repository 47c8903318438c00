"""What is kept of the old policy: how its KL relates to the exact one, and in what precision."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from language_model import VOCABULARY, Rollout, evaluated
from torch import Tensor, nn
from torch.distributions import Categorical, kl_divergence

from trpo_optim import Closures, TrustRegionError, TrustRegionOptimizer
from trpo_optim.tokens import token_closures

pytestmark = pytest.mark.usefixtures("flat_policies_pass")


def moved_kl(rollout: Rollout, old: Any) -> Tensor:
    """Return the KL per token, or its estimate, after the parameters have moved by as much."""
    closures = token_closures(
        rollout.logits, rollout.tokens, rollout.mask, rollout.advantages, old=old
    )
    before = [each.detach().clone() for each in rollout.parameters]
    rollout.move()
    kl = closures()[1].detach()
    with torch.no_grad():
        for each, value in zip(rollout.parameters, before, strict=True):
            each.copy_(value)
    return kl


def test_more_events_see_more_of_the_kl_and_all_see_the_whole() -> None:
    rollout = Rollout()
    exact = moved_kl(rollout, "logits")
    kls = [moved_kl(rollout, k) for k in range(1, VOCABULARY + 3)]
    for fewer, more in itertools.pairwise(kls[: VOCABULARY - 1]):
        assert bool((fewer <= more + 1e-15).all())
        assert fewer.mean() < more.mean()
    assert 0 < kls[0].mean() < 0.9 * exact.mean()
    for whole in kls[VOCABULARY - 2 :]:
        torch.testing.assert_close(whole, exact, rtol=0, atol=1e-14)


@pytest.mark.parametrize("k", [2, "logits"])
def test_tokens_that_are_ruled_out_leave_the_kl_a_number(k: Any) -> None:
    """Also where the policy allows no token but the likeliest."""
    legal = torch.tensor([True, True] + [False] * (VOCABULARY - 2))
    model = nn.Sequential(nn.Embedding(VOCABULARY, 4), nn.Linear(4, VOCABULARY)).double()
    tokens = torch.randint(2, (6, 5))

    def logits(rows: Any) -> Tensor:
        result: Tensor = model(tokens[rows]).masked_fill(~legal, -math.inf)
        return result

    closures = token_closures(logits, tokens, None, torch.randn(6, dtype=torch.float64), old=k)
    report = TrustRegionOptimizer(model.parameters()).step(closures)
    assert report.accepted
    assert 0.009 < report.kl <= 0.01


@pytest.mark.parametrize("micro_batch", [None, 4])
@pytest.mark.parametrize("per", ["token", "sequence"])
def test_the_largest_kl_of_a_token_or_a_sequence_can_be_bounded(
    per: Any, micro_batch: int | None
) -> None:
    rollout = Rollout()
    before = Categorical(logits=rollout.logits().detach())
    closures = token_closures(
        rollout.logits,
        rollout.tokens,
        rollout.mask,
        rollout.advantages,
        old="logits",
        per=per,
        micro_batch=micro_batch,
    )
    report = TrustRegionOptimizer(rollout.parameters, constraint="max").step(closures)
    assert report.accepted
    kls = kl_divergence(before, Categorical(logits=rollout.logits())).where(rollout.mask, 0)
    largest = kls.max() if per == "token" else kls.sum(1).max()
    assert 0.005 < largest.item() <= 0.01


def one_token(behaviour: Tensor | None, old: Any) -> tuple[Callable[[Tensor], Closures], Tensor]:
    """Return the closures at logits, (V,), for each token of the vocabulary drawn once."""
    tokens = torch.arange(VOCABULARY)[:, None]
    advantages = torch.randn(VOCABULARY, dtype=torch.float64)

    def of(logits: Tensor) -> Closures:
        return token_closures(
            lambda rows: logits.expand(VOCABULARY, 1, VOCABULARY)[rows],
            tokens,
            None,
            advantages,
            old=old,
            behaviour_log_prob=behaviour,
        )

    return of, advantages


@pytest.mark.parametrize("old", ["log_prob", "logits"])
def test_kl_and_loss_are_exact_in_expectation_over_what_another_policy_drew(old: Any) -> None:
    """A uniform policy draws each token of the vocabulary once."""
    torch.manual_seed(0)
    uniform = torch.full((VOCABULARY, 1), -math.log(VOCABULARY), dtype=torch.float64)
    logits = torch.randn(VOCABULARY, dtype=torch.float64, requires_grad=True)
    of, advantages = one_token(uniform, old)
    closures = of(logits)
    before = Categorical(logits=logits.detach().clone())
    with torch.no_grad():
        logits += 0.3 * torch.randn(VOCABULARY, dtype=torch.float64)
    loss, kl, _ = evaluated(closures)
    after = Categorical(logits=logits)
    exact = kl_divergence(before, after)
    torch.testing.assert_close(kl, exact, rtol=0, atol=1e-12)
    torch.testing.assert_close(loss, -(after.probs * advantages).sum(), rtol=0, atol=1e-12)
    ours, theirs = (torch.autograd.grad(each, logits)[0] for each in (kl, exact))
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-12)


@pytest.mark.parametrize("old", ["log_prob", "logits", 20])
def test_the_kl_of_logits_in_half_precision_is_one_in_single(old: Any) -> None:
    torch.manual_seed(0)
    tokens = torch.randint(100, (64, 16))
    start = torch.randn(64, 16, 100)
    change = torch.zeros((), requires_grad=True)
    direction = torch.randn(64, 16, 100)

    def logits(rows: Any) -> Tensor:
        return (start + change * direction)[rows].bfloat16()

    closures = token_closures(logits, tokens, None, torch.randn(64), old=old)
    with torch.no_grad():
        change += 0.1
    loss, kl, _ = evaluated(closures)
    assert loss.dtype is kl.dtype is torch.float32
    before, after = (
        each.bfloat16().double().log_softmax(-1) for each in (start, start + 0.1 * direction)
    )
    if old == "log_prob":
        log_ratio = (after - before).gather(-1, tokens[..., None])
        expected = (log_ratio.exp() - 1 - log_ratio).mean()
    elif old == "logits":
        expected = (before.exp() * (before - after)).sum(-1).mean()
    else:
        single = before.topk(old).indices
        masses = []
        for each in (before.exp(), after.exp()):
            part = each.gather(-1, single)
            masses.append(torch.cat([part, 1 - part.sum(-1, keepdim=True)], -1))
        expected = (masses[0] * (masses[0] / masses[1]).log()).sum(-1).mean()
    assert kl.item() == pytest.approx(expected.item(), rel=1e-4)


@pytest.mark.parametrize("old", ["log_prob", "logits", 2])
def test_dropout_draws_the_old_policys_masks_again(old: Any) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Embedding(VOCABULARY, 16), nn.Dropout(0.5), nn.Linear(16, VOCABULARY))
    tokens, advantages = torch.randint(VOCABULARY, (8, 6)), torch.randn(8)
    before = torch.get_rng_state()
    closures = token_closures(lambda rows: model(tokens[rows]), tokens, None, advantages, old=old)
    assert torch.equal(torch.get_rng_state(), before)
    assert TrustRegionOptimizer(model.parameters()).step(closures).accepted


ROWS = {"tokens": torch.zeros(2, 3, dtype=torch.long), "mask": None, "advantages": torch.zeros(2)}
NAN = torch.tensor([[0.0, 0.0, 0.0], [0.0, math.nan, 0.0]])


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"tokens": torch.zeros(3, dtype=torch.long)}, ["(3,)", "(N, T)"]),
        ({"tokens": torch.full((2, 3), -100)}, ["-100", "mask=tokens != -100"]),
        ({"tokens": torch.full((2, 3), 9)}, ["hold 9", "8 entries"]),
        ({"mask": torch.zeros(2, 3)}, ["all false"]),
        ({"mask": torch.ones(2)}, ["mask has shape (2,)"]),
        ({"advantages": torch.zeros(3)}, ["advantages", "(3,)", "(2, 3)", "(N,)"]),
        ({"advantages": NAN}, ["advantages is nan at token 1 of sequence 1"]),
        ({"behaviour_log_prob": NAN}, ["behaviour_log_prob is nan at token 1"]),
        ({"reference_log_prob": NAN, "reference_weight": 1.0}, ["reference_log_prob is nan"]),
        ({"behaviour_log_prob": torch.full((2, 3), 0.5)}, ["holds 0.5", "neither π nor −ln π"]),
        ({"tokens": [[0, 1]]}, ["a list", "(N, T)"]),
        ({"temperature": "x"}, ["temperature is 'x'"]),
        ({"curvature": "x"}, ["curvature is 'x'"]),
        ({"reference_weight": 0.1}, ["reference_weight is 0.1", "reference_log_prob is None"]),
        ({"reference_weight": math.nan}, ["reference_weight is nan"]),
        (
            {"reference_log_prob": NAN - 1},
            ["reference_log_prob is given", "reference_weight is not"],
        ),
        ({"old": "probs"}, ["'probs'", "'log_prob', 'logits'"]),
        ({"old": 0}, ["old is 0", "at least 1"]),
        ({"old": True}, ["old is True"]),
        ({"per": "batch"}, ["'batch'"]),
        ({"temperature": -1.0}, ["temperature is -1.0"]),
        ({"micro_batch": 0}, ["micro_batch is 0"]),
        ({"curvature": 0.0}, ["curvature is 0.0", "(0, 1]"]),
        ({"curvature": 1.5}, ["curvature is 1.5"]),
        ({"outputs": lambda rows: {"logits": None}}, ["returned a dict", ".logits[:, :-1]"]),
        ({"outputs": lambda rows: torch.zeros(2, 4, 8)}, ["(2, 4, 8)", "logits[:, :-1]"]),
        ({"outputs": lambda rows: torch.zeros(2, 3), "old": 4}, ["log-probabilities", "old is 4"]),
        (
            {"outputs": lambda rows: torch.zeros(2, 3), "temperature": 0.5},
            ["log-probabilities", "temperature is 0.5"],
        ),
        ({"head": nn.Linear(8, 8), "chunk": 0}, ["chunk is 0"]),
        ({"advantages": [1.0, 2.0]}, ["advantages is a list", "torch.as_tensor"]),
        ({"mask": [[True]]}, ["mask is a list", "torch.as_tensor"]),
        ({"behaviour_log_prob": [0.0]}, ["behaviour_log_prob is a list"]),
        ({"tokens": torch.zeros(2, 0, dtype=torch.long)}, ["shape (2, 0): there are none"]),
        ({"tokens": torch.zeros(0, 3, dtype=torch.long)}, ["shape (0, 3): there are none"]),
        ({"chunk": 256}, ["chunk is 256 and head is None", "pass head="]),
        ({"head": 5}, ["head is a int", "(n, H)"]),
        ({"head": lambda hidden: hidden.sum()}, ["head returned shape ()", "(6, V)"]),
        ({"head": lambda hidden: hidden[:, 0].long()}, ["shape (6,), torch.int64"]),
        ({"head": lambda hidden: hidden[:2]}, ["shape (2, 8)", "(6, 8)"]),
        ({"head": lambda hidden: (hidden, None)}, ["head returned a tuple"]),
        ({"tokens": torch.full((2, 3), 9)}, ["hidden states and no logits, pass head="]),
        (
            {"outputs": lambda rows: torch.zeros(2, 4, 8), "head": nn.Linear(8, 8)},
            ["(2, 4, 8)", "hidden[:, :-1]"],
        ),
    ],
)
def test_what_does_not_fit_is_an_error_with_its_remedy(
    change: dict[str, Any], words: list[str]
) -> None:
    given: dict[str, Any] = {"outputs": lambda rows: torch.zeros(2, 3, 8)[rows], **ROWS, **change}
    with pytest.raises(TrustRegionError) as error:
        token_closures(**given)
    assert all(word in str(error.value) for word in words), error.value


def of_masses(likeliest: float, rows: int = 4) -> Callable[[Any], Tensor]:
    """Return logits of 8 tokens, the first two of which share some probability."""
    masses = torch.full((rows, 5, 8), (1 - likeliest) / 6, dtype=torch.float64)
    masses[..., :2] = likeliest / 2
    return lambda places: masses.log()[places]


def test_a_k_whose_tokens_hold_too_little_probability_is_refused(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.undo()
    arguments = torch.zeros(4, 5, dtype=torch.long), None, torch.randn(4)
    old: Any
    for old in (2, "log_prob", "logits", 7):
        token_closures(of_masses(0.91), *arguments, old=old)
    for old in ("log_prob", "logits", 7):
        token_closures(of_masses(0.89), *arguments, old=old)
    match = r"old is 2, .* hold 89.0% .* at least 90%.*'logits'"
    with pytest.raises(TrustRegionError, match=match):
        token_closures(of_masses(0.89), *arguments, old=2)


def test_the_probability_of_likeliest_tokens_is_the_mean_over_all_micro_batches(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.undo()
    even, peaked = of_masses(0.85, rows=1), of_masses(0.96, rows=1)

    def logits(rows: Any) -> Tensor:
        every = torch.cat([even(slice(None)), *3 * [peaked(slice(None))]])
        return every[rows]

    arguments = torch.zeros(4, 5, dtype=torch.long), None, torch.randn(4)
    for micro_batch in (None, 1, 2):
        closures = token_closures(logits, *arguments, old=2, micro_batch=micro_batch, curvature=0.3)
        assert len(closures.parts) == 4 // (micro_batch or 4)
