"""Exact KLs and log-probabilities of more logits than are evaluated at once."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from language_model import derivatives
from torch import Tensor
from torch.overrides import TorchFunctionMode

from trpo_optim.tokens import token_closures, token_log_prob
from trpo_optim.tokens.log_prob import in_pieces

ROWS, TOKENS, WORDS = 3, 40, 5000


class Counted(TorchFunctionMode):
    """Counts calls of logsumexp."""

    calls = 0

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        """Count one function of torch, and call it."""
        self.calls += func is Tensor.logsumexp
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize(("shape", "most"), [((9000, 1, 4), 1), ((500, 7, 100), 2)])
def test_short_sequences_share_a_piece(shape: tuple[int, ...], most: int) -> None:
    torch.manual_seed(0)
    logits, tokens = torch.randn(shape), torch.randint(shape[-1], shape[:-1])
    with Counted() as counted:
        values = token_log_prob(logits, tokens)
    assert counted.calls <= most
    expected = logits.log_softmax(-1).gather(-1, tokens[..., None]).squeeze(-1)
    torch.testing.assert_close(values, expected)


@pytest.mark.parametrize("shape", [(2, 3, 120_000), (2, 2, 3, 90_000)])
def test_a_long_sequence_is_cut_into_pieces(shape: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    logits, tokens = torch.randn(shape), torch.randint(shape[-1], shape[:-1])
    with Counted() as counted:
        values = token_log_prob(logits, tokens)
    assert counted.calls > shape[0]
    expected = logits.log_softmax(-1).gather(-1, tokens[..., None]).squeeze(-1)
    torch.testing.assert_close(values, expected)


@pytest.mark.parametrize("ruled_out", [False, True])
@pytest.mark.parametrize("head", [False, True])
def test_the_kl_over_several_pieces_is_that_of_the_vocabulary(head: bool, ruled_out: bool) -> None:
    torch.manual_seed(0)
    table = torch.randn(ROWS, TOKENS, WORDS, dtype=torch.float64)
    out = torch.rand(table.shape) < 0.1
    tokens = out.long().argmin(-1)
    shift = torch.zeros(WORDS, dtype=torch.float64, requires_grad=True)
    assert len(in_pieces(table.flatten(0, 1))) > 1

    def logits(rows: Any) -> Tensor:
        moved = table[rows] + shift * torch.arange(TOKENS)[:, None].sin()
        return moved.masked_fill(out[rows], -math.inf) if ruled_out else moved

    options: dict[str, Any] = {"head": lambda rows: 1 * rows, "chunk": 100} if head else {}
    with torch.no_grad():
        old = logits(slice(None)).log_softmax(-1)
    closures = token_closures(logits, tokens, None, torch.ones(ROWS), old="logits", **options)
    with torch.no_grad():
        shift.copy_(0.3 * torch.randn(WORDS))
    _, ours, *_ = closures.parts[0]()
    new = logits(slice(None)).log_softmax(-1)
    theirs = old.exp().mul((old - new).masked_fill(old.isinf(), 0)).sum(-1)
    torch.testing.assert_close(
        derivatives(ours.mean(), [shift]), derivatives(theirs.mean(), [shift]), rtol=0, atol=1e-12
    )
