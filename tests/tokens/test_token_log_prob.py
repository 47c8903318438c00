"""Log-probabilities of tokens beside torch's log-softmax, whole and in chunks."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from language_model import VOCABULARY, Rollout, derivatives, kept_elements
from torch import Tensor, nn
from torch.autograd import gradgradcheck

from trpo_optim import TrustRegionError
from trpo_optim.tokens import chunked_log_prob, token_log_prob


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_it_is_the_log_softmax_at_the_token(temperature: float) -> None:
    rollout = Rollout()
    logits = rollout.logits()
    before = logits.clone()
    ours = token_log_prob(logits, rollout.tokens, temperature=temperature)
    torch.testing.assert_close(ours, rollout.log_prob(temperature), rtol=0, atol=1e-12)
    assert torch.equal(logits, before)


def test_it_has_second_derivatives() -> None:
    torch.manual_seed(0)
    logits = torch.randn(2, 3, 5, dtype=torch.float64, requires_grad=True)
    tokens, mask = torch.randint(5, (2, 3)), torch.tensor([[1, 1, 0], [0, 1, 1]])
    assert gradgradcheck(lambda each: token_log_prob(each, tokens, temperature=0.5), logits)
    assert gradgradcheck(lambda each: token_log_prob(each, tokens, mask), logits)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_logits_in_half_precision_give_log_probabilities_in_single(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    logits, tokens = 5 * torch.randn(4, 1000), torch.randint(1000, (4,))
    half = logits.to(dtype)
    ours = token_log_prob(half, tokens)
    assert ours.dtype is torch.float32
    expected = half.double().log_softmax(-1).gather(-1, tokens[:, None]).squeeze(-1)
    torch.testing.assert_close(ours.double(), expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("mask_type", [torch.bool, torch.int64])
def test_padding_is_zero_and_takes_no_part_in_the_gradient(mask_type: torch.dtype) -> None:
    torch.manual_seed(0)
    logits = torch.randn(2, 3, 5)
    logits[0, 2] = math.nan  # as attention gives where it may see nothing
    logits.requires_grad_()
    tokens = torch.tensor([[1, 4, -100], [0, -100, 2]])
    values = token_log_prob(logits, tokens, mask=(tokens != -100).to(mask_type))
    assert torch.equal(values == 0, tokens == -100)
    (slope,) = torch.autograd.grad(values.sum(), logits)
    assert torch.equal(slope.abs().sum(-1) == 0, tokens == -100)


class Wide(nn.Module):
    """A head that counts the positions it is applied to, and the most at once."""

    def __init__(self, head: nn.Module) -> None:
        super().__init__()
        self.head = head
        self.positions, self.most = 0, 0

    def forward(self, hidden: Tensor) -> Tensor:
        self.positions += len(hidden)
        self.most = max(self.most, len(hidden))
        result: Tensor = self.head(hidden)
        return result


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("chunk", [1, 7, 1000])
def test_chunks_are_equal_to_the_whole(chunk: int, masked: bool) -> None:
    rollout = Rollout()
    mask = rollout.mask if masked else None
    whole = token_log_prob(rollout.logits(), rollout.tokens, mask, temperature=0.7)
    head = Wide(rollout.model.head)
    hidden = rollout.model.hidden(rollout.whole[:, :-1])
    ours = chunked_log_prob(hidden, head, rollout.tokens, mask, temperature=0.7, chunk=chunk)
    assert ours.shape == whole.shape
    assert head.positions == (int(rollout.mask.sum()) if masked else rollout.tokens.numel())
    assert head.most <= chunk
    cotangent = torch.randn(whole.shape, dtype=whole.dtype)
    expected, found = (
        derivatives((cotangent * each).sum(), rollout.parameters) for each in (whole, ours)
    )
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)


def test_chunks_have_second_derivatives() -> None:
    torch.manual_seed(0)
    hidden = torch.randn(5, 3, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(4, 3, dtype=torch.float64, requires_grad=True)
    tokens = torch.randint(4, (5,))

    def values(hidden: Tensor, weight: Tensor) -> Tensor:
        return chunked_log_prob(hidden, lambda each: each @ weight.T, tokens, chunk=2)

    assert gradgradcheck(values, (hidden, weight))


def test_chunks_keep_no_logits() -> None:
    torch.manual_seed(0)
    head, hidden = nn.Linear(4, 500), torch.randn(20, 4, requires_grad=True)
    tokens = torch.randint(500, (20,))
    assert kept_elements(lambda: token_log_prob(head(hidden), tokens)) == 20 * 500
    assert kept_elements(lambda: chunked_log_prob(hidden, head, tokens, chunk=5)) <= 500 * 4


LOGITS, TOKENS = torch.zeros(2, 4, VOCABULARY), torch.zeros(2, 4, dtype=torch.long)


@pytest.mark.parametrize(
    ("logits", "tokens", "options", "words"),
    [
        (LOGITS, TOKENS[:, 1:], {}, ["(2, 4, 8)", "(2, 3)", "logits[:, :-1]"]),
        (LOGITS, TOKENS.float(), {}, ["torch.float32", "integers"]),
        (LOGITS, TOKENS.bool(), {}, ["torch.bool", "integers"]),
        (LOGITS, TOKENS - 100, {}, ["-100", "mask=tokens != -100"]),
        (LOGITS, TOKENS + VOCABULARY, {}, ["hold 8", "8 entries", "tokenizer"]),
        (LOGITS.long(), TOKENS, {}, ["torch.int64", "floating point"]),
        (LOGITS, TOKENS, {"temperature": 0.0}, ["temperature is 0.0", "above 0"]),
        (LOGITS, TOKENS, {"temperature": math.nan}, ["temperature is nan"]),
        (LOGITS, TOKENS, {"mask": torch.ones(2)}, ["mask has shape (2,)", "(2, 4)"]),
        (LOGITS, TOKENS, {"mask": torch.zeros(2, 4)}, ["all false"]),
        (LOGITS, TOKENS, {"mask": torch.full((2, 4), 2)}, ["0 and 1"]),
    ],
)
def test_what_does_not_fit_is_an_error_with_its_remedy(
    logits: Tensor, tokens: Tensor, options: dict[str, Any], words: list[str]
) -> None:
    with pytest.raises(TrustRegionError) as error:
        token_log_prob(logits, tokens, **options)
    assert all(word in str(error.value) for word in words), error.value


def test_hidden_states_that_do_not_fit_are_an_error() -> None:
    head = nn.Linear(8, VOCABULARY)
    with pytest.raises(TrustRegionError, match=r"hidden\[:, :-1\]"):
        chunked_log_prob(LOGITS, head, TOKENS[:, 1:])
    with pytest.raises(TrustRegionError, match="chunk is 0"):
        chunked_log_prob(LOGITS, head, TOKENS, chunk=0)
    with pytest.raises(TrustRegionError, match="chunk is None; it must be a whole number"):
        chunked_log_prob(LOGITS, head, TOKENS, chunk=None)  # type: ignore[arg-type]  # the mistake


def test_a_single_token_has_a_log_probability_in_chunks_too() -> None:
    torch.manual_seed(0)
    head, hidden, token = nn.Linear(4, 9), torch.randn(4), torch.tensor(2)
    for mask in (None, torch.tensor(True)):
        found = chunked_log_prob(hidden, head, token, mask)
        torch.testing.assert_close(found, token_log_prob(head(hidden), token, mask))


@pytest.mark.parametrize("dtype", [torch.uint8, torch.uint16, torch.int32])
def test_tokens_may_have_any_integer_type(dtype: torch.dtype) -> None:
    torch.testing.assert_close(
        token_log_prob(LOGITS, TOKENS.to(dtype)), token_log_prob(LOGITS, TOKENS)
    )
