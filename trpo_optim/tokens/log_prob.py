"""Log-probabilities of tokens, without a log-softmax over the vocabulary."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from trpo_optim.distributions.precision import widened
from trpo_optim.tokens.arguments import (
    counted_tokens,
    require_aligned,
    require_temperature,
    require_vocabulary,
)

__all__ = ["at_temperature", "chosen", "in_pieces", "log_sum_exp", "spread", "token_log_prob"]

_PIECE = {"cpu": 2**18}
"""How many numbers fit into a core's cache. Other devices have 2²⁶, for the sake of memory."""


def token_log_prob(
    logits: Tensor, tokens: Tensor, mask: Tensor | None = None, *, temperature: float = 1.0
) -> Tensor:
    """Return the log-probability of every token, ln softmax(logits / temperature)[token].

    It is the token's logit minus the logsumexp of all logits. No log-softmax of shape (…, V) is
    made. With a mask, only the logits of tokens that count are used.

    Args:
        logits: What predicts each token, shape (…, V). They are not changed.
        tokens: The tokens, integers of shape (…). Where the mask is false, they may be any integer,
            such as −100.
        mask: True where a token counts, in the shape of the tokens. None: all count.
        temperature: The temperature at which the tokens were drawn.

    Returns:
        A tensor in the shape of the tokens, in float32 at least. It is 0 where the mask is false.

    Raises:
        TrustRegionError: If the shapes do not fit, a token is not in the vocabulary, or
            ``temperature`` is outside its range.

    Example:
        >>> import torch
        >>> from trpo_optim.tokens import token_log_prob
        >>> logits = torch.tensor([[0.0, 0.0], [0.0, 0.0], [1.0, 2.0]])
        >>> tokens = torch.tensor([0, 1, -100])  # −100 is padding
        >>> token_log_prob(logits, tokens, mask=tokens != -100).exp()
        tensor([0.5000, 0.5000, 1.0000])
    """
    require_temperature(temperature)
    require_aligned(logits, tokens)
    counted = counted_tokens(tokens, mask)
    picked = tokens if counted is None else tokens[counted]
    require_vocabulary(picked, logits.shape[-1])
    rows = at_temperature(logits if counted is None else logits[counted], temperature)
    values = chosen(rows, picked) - log_sum_exp(rows)
    return values if counted is None else spread(values, counted)


def in_pieces(rows: Tensor) -> Sequence[Tensor]:
    """Return a tensor, (m, …), in pieces of rows that several passes are fast on."""
    size = max(1, _most(rows) // max(1, math.prod(rows.shape[1:])))
    pieces: tuple[Tensor, ...] = rows.split(size)
    return pieces


def log_sum_exp(logits: Tensor) -> Tensor:
    """Return ``logits.logsumexp(-1)``, a few rows at a time."""
    if logits.dim() < 2 or not len(logits):
        return logits.logsumexp(-1)
    if logits.dim() > 2 and math.prod(logits.shape[1:]) > _most(logits):
        return torch.stack([log_sum_exp(each) for each in logits])
    return torch.cat([each.logsumexp(-1) for each in in_pieces(logits)])


def _most(rows: Tensor) -> int:
    """Return how many numbers a piece may hold."""
    return _PIECE.get(rows.device.type, 2**26)


def at_temperature(logits: Tensor, temperature: float) -> Tensor:
    """Return logits / temperature, in float32 at least."""
    wide = widened(logits, torch.float32)
    return wide if temperature == 1 else wide / temperature


def chosen(logits: Tensor, tokens: Tensor) -> Tensor:
    """Return the logit of every token, (…), of all logits, (…, V)."""
    return logits.gather(-1, tokens.long().unsqueeze(-1)).squeeze(-1)


def spread(values: Tensor, mask: Tensor) -> Tensor:
    """Return a tensor that holds values, (m,), in order where the mask is true, and else 0."""
    return values.new_zeros(mask.shape).masked_scatter(mask, values)
