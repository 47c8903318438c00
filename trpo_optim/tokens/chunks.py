"""Log-probabilities of tokens from hidden states, a chunk of positions at a time."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from trpo_optim.distributions.arguments import is_count
from trpo_optim.errors import TrustRegionError
from trpo_optim.tokens.arguments import counted_tokens, require_hidden
from trpo_optim.tokens.log_prob import spread, token_log_prob

__all__ = ["chunked_log_prob", "evaluated_again"]

ResultT = TypeVar("ResultT")


def evaluated_again(function: Callable[..., ResultT], *arguments: Tensor) -> ResultT:
    """Evaluate a function whose backward pass evaluates it again, and so keeps nothing of it."""
    result: Any = checkpoint(function, *arguments, use_reentrant=False)
    return result  # type: ignore[no-any-return]


def chunked_log_prob(
    hidden: Tensor,
    head: Callable[[Tensor], Tensor],
    tokens: Tensor,
    mask: Tensor | None = None,
    *,
    temperature: float = 1.0,
    chunk: int = 1024,
) -> Tensor:
    """Return the log-probability of every token, without keeping logits of shape (…, V).

    The head is applied to ``chunk`` positions at a time. The backward pass applies the head again
    instead of keeping its logits (``torch.utils.checkpoint``). With a mask, only the positions that
    count go through the head.

    Args:
        hidden: The hidden state that predicts each token, shape (…, H).
        head: Returns the logits, (n, V), of hidden states, (n, H); usually a linear layer.
        tokens: The tokens, integers of shape (…).
        mask: True where a token counts, in the shape of the tokens. None: all count.
        temperature: The temperature at which the tokens were drawn.
        chunk: The most positions whose logits exist at once.

    Returns:
        What ``token_log_prob(head(hidden), tokens, mask)`` returns.

    Raises:
        TrustRegionError: If the shapes do not fit, a token is not in the vocabulary, or an option
            is outside its range.

    Example:
        >>> import torch
        >>> from trpo_optim.tokens import chunked_log_prob, token_log_prob
        >>> head = torch.nn.Linear(8, 50)
        >>> hidden, tokens = torch.randn(2, 10, 8), torch.randint(50, (2, 10))
        >>> values = chunked_log_prob(hidden, head, tokens, chunk=7)
        >>> torch.allclose(values, token_log_prob(head(hidden), tokens), atol=1e-5)
        True
    """
    if not is_count(chunk):
        raise TrustRegionError(f"chunk is {chunk!r}; it must be a whole number of at least 1.")
    require_hidden(hidden, tokens)
    counted = counted_tokens(tokens, mask)
    rows = hidden.reshape(-1, hidden.shape[-1]) if counted is None else hidden[counted]
    picked = tokens.reshape(-1) if counted is None else tokens[counted]

    def of_chunk(part: Tensor, part_tokens: Tensor) -> Tensor:
        return token_log_prob(head(part), part_tokens, temperature=temperature)

    pairs = zip(rows.split(int(chunk)), picked.split(int(chunk)), strict=True)
    parts = [evaluated_again(of_chunk, *each) for each in pairs]
    values = torch.cat(parts)
    return values.view(tokens.shape) if counted is None else spread(values, counted)
