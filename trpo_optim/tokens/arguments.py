"""Checks of tokens, logits and the numbers that belong to each token."""

from __future__ import annotations

import math
from numbers import Real
from typing import Any

import torch
from torch import Tensor

from trpo_optim.distributions.arguments import require_counts, require_no_graph, require_tensor
from trpo_optim.distributions.masks import checked_mask, require_fit
from trpo_optim.errors import TrustRegionError

__all__ = [
    "counted_tokens",
    "penalty_weight",
    "require_aligned",
    "require_batching",
    "require_drawn",
    "require_head",
    "require_hidden",
    "require_log_probs",
    "require_logits_of_head",
    "require_numbers",
    "require_possible",
    "require_sequences",
    "require_temperature",
    "require_vocabulary",
]


_ROUNDING = 0.1
"""How far above 0 half precision may leave the logarithm of a probability of 1."""

_FURTHEST = 0.5
"""Nats per token that the present policy may be from one that was certain of every token."""


_OTHER_ROWS = (
    "A function of rows must evaluate the rows that it is given, and no others, such as "
    "model(sequences[rows])."
)


def require_temperature(temperature: float) -> None:
    """Check that a temperature is a finite number above 0."""
    if not isinstance(temperature, Real) or not 0 < float(temperature) < math.inf:
        raise TrustRegionError(
            f"temperature is {temperature!r}; it must be a finite number above 0. Pass the "
            "temperature at which the tokens were drawn."
        )


def require_aligned(logits: Tensor, tokens: Tensor) -> None:
    """Check that there is one row of logits per token."""
    if not logits.is_floating_point():
        raise TrustRegionError(f"The logits are {logits.dtype}; they must be floating point.")
    if logits.shape[:-1] != tokens.shape or logits.dim() == 0:
        raise TrustRegionError(
            f"The logits have shape {tuple(logits.shape)} and the tokens {tuple(tokens.shape)}. "
            "Pass one row of logits per token, shape (*tokens.shape, V). "
            + (
                _OTHER_ROWS
                if logits.shape[1:-1] == tokens.shape[1:]
                else "The logits at position t predict the token at t + 1, so a model that has "
                "read all tokens gives logits[:, :-1] for tokens[:, 1:]."
            )
        )


def require_hidden(hidden: Tensor, tokens: Tensor) -> None:
    """Check that there is one hidden state per token."""
    if hidden.shape[:-1] != tokens.shape or hidden.dim() == 0:
        raise TrustRegionError(
            f"The hidden states have shape {tuple(hidden.shape)} and the tokens "
            f"{tuple(tokens.shape)}. Pass one hidden state per token, shape (*tokens.shape, H). "
            + (
                _OTHER_ROWS
                if hidden.shape[1:-1] == tokens.shape[1:]
                else "The hidden state at position t predicts the token at t + 1, so pass "
                "hidden[:, :-1] with tokens[:, 1:]."
            )
        )


def require_head(head: Any, chunk: int | None) -> None:
    """Check that a head can be called, and that a chunk is one of a head."""
    if chunk is not None:
        require_counts(chunk=chunk)
        if head is None:
            raise TrustRegionError(
                f"chunk is {chunk} and head is None. Chunks are made of the head's logits: pass "
                "head= and return hidden states, or leave chunk out."
            )
    if head is not None and not callable(head):
        raise TrustRegionError(
            f"head is a {type(head).__name__}; it must be a function from hidden states, (n, H), "
            "to logits, (n, V), such as the model's last layer."
        )


def require_logits_of_head(logits: Any, hidden: Tensor) -> None:
    """Check that a head returned one row of logits per hidden state."""
    if isinstance(logits, Tensor) and logits.is_floating_point() and logits.dim() == 2:
        if len(logits) == len(hidden):
            return
        given = f"shape {tuple(logits.shape)}"
    elif isinstance(logits, Tensor):
        given = f"shape {tuple(logits.shape)}, {logits.dtype}"
    else:
        given = f"a {type(logits).__name__}"
    raise TrustRegionError(
        f"head returned {given}, for hidden states of shape {tuple(hidden.shape)}. Return the "
        f"logits, a floating-point tensor of shape ({len(hidden)}, V)."
    )


def counted_tokens(tokens: Tensor, mask: Tensor | None) -> Tensor | None:
    """Check the type of tokens and the mask over them.

    Args:
        tokens: Any shape.
        mask: True where a token counts, in the same shape. None: all count.

    Returns:
        The mask as one of bools, or None.

    Raises:
        TrustRegionError: If tokens are not integers, or the mask does not fit.
    """
    if tokens.is_floating_point() or tokens.is_complex() or tokens.dtype is torch.bool:
        raise TrustRegionError(
            f"The tokens are {tokens.dtype}. They are indices into the vocabulary: pass integers, "
            "such as torch.long."
        )
    counted = checked_mask(mask)
    if counted is not None:
        require_fit(counted, tokens)
    return counted


def require_batching(micro_batch: int | None, curvature: float) -> None:
    """Check the options that say how much is evaluated at once."""
    require_counts(micro_batch=micro_batch)
    if not isinstance(curvature, Real) or not 0 < float(curvature) <= 1:
        raise TrustRegionError(f"curvature is {curvature!r}; it must be a share in (0, 1].")


def require_sequences(outputs: Any, tokens: Any) -> None:
    """Check that tokens are sequences of one length, (N, T), and what evaluates them a function."""
    if not callable(outputs):
        raise TrustRegionError(
            f"outputs is a {type(outputs).__name__}; it must be a function of rows, since it is "
            "called again at other parameters: lambda rows: model(sequences[rows])[:, :-1]."
        )
    if not isinstance(tokens, Tensor) or tokens.dim() != 2:
        given = f"a {type(tokens).__name__}"
        if isinstance(tokens, Tensor):
            given = f"a tensor of shape {tuple(tokens.shape)}"
        raise TrustRegionError(
            f"The tokens are {given}; they must be a tensor of shape (N, T). Pad the sequences to "
            "one length, and pass a mask that is false for padding."
        )
    if tokens.numel() == 0:
        raise TrustRegionError(
            f"The tokens have shape {tuple(tokens.shape)}: there are none. Leave this batch out."
        )


def require_vocabulary(tokens: Tensor, size: float) -> None:
    """Check that tokens, all of which count, are indices into a vocabulary."""
    if tokens.numel() == 0:
        return
    least, most = torch.stack(tokens.long().aminmax()).tolist()
    if least < 0:
        raise TrustRegionError(
            f"The tokens hold {least}; a token is at least 0. If {least} marks padding, pass a "
            f"mask that is false there, such as mask=tokens != {least}."
        )
    if most >= size:
        raise TrustRegionError(
            f"The tokens hold {most}, and the logits have {size} entries; a token must be less. "
            "Use the tokenizer of this model, and pass a mask that is false for padding. If these "
            "are hidden states and no logits, pass head=."
        )


def require_numbers(name: str, values: Tensor, counted: Tensor) -> None:
    """Check that there is a finite number, without a graph, for every token that counts."""
    require_tensor(name, values)
    per_sequence = ", or one per sequence, shape (N,)" if name == "advantages" else ""
    if values.shape != counted.shape:
        raise TrustRegionError(
            f"{name} has shape {tuple(values.shape)} and the tokens {tuple(counted.shape)}. Pass "
            f"one number per token, shape (N, T){per_sequence}."
        )
    require_no_graph(name, values)
    bad = (~values.isfinite() & counted).nonzero()
    if len(bad):
        row, place = bad[0].tolist()
        raise TrustRegionError(
            f"{name} is {float(values[row, place])} at token {place} of sequence {row}; it must be "
            "a finite number where the mask is true."
        )
    if name != "advantages":
        require_log_probs(name, values[counted])


def require_log_probs(name: str, values: Tensor) -> None:
    """Check that numbers may be logarithms of probabilities.

    Args:
        name: Where they are from, for the error.
        values: The numbers of tokens that count, (m,).

    Raises:
        TrustRegionError: If one is above 0, beyond rounding.
    """
    if bool((values > _ROUNDING).any()):
        raise TrustRegionError(
            f"{name} holds {float(values.max()):g}; the logarithm of a probability is at most 0. "
            "Pass ln π, neither π nor −ln π."
        )


def require_possible(log_prob: Tensor) -> None:
    """Check that the present policy may have drawn the tokens that it is said to have drawn.

    Args:
        log_prob: ln π of the tokens that count, (m,).

    Raises:
        TrustRegionError: If it rules out one of them.
    """
    if ruled_out := int((log_prob == -math.inf).sum()):
        raise TrustRegionError(
            f"The present policy rules out {ruled_out} of the {len(log_prob)} tokens that count: "
            "outputs(rows) gives them a log-probability of -inf. Compute the logits with the bans "
            "and masks with which the tokens were drawn, or pass behaviour_log_prob=, that of what "
            "drew them."
        )


def require_drawn(behaviour_log_prob: Tensor, counted: Tensor, old_log_prob: float) -> None:
    """Check that log-probabilities are not all 0, as where a mask left out what now counts.

    Args:
        behaviour_log_prob: ln π of what drew the tokens, (N, T).
        counted: Which of them count.
        old_log_prob: ln π of the present policy, the mean over the tokens that count.

    Raises:
        TrustRegionError: If they are, and the present policy is far from certain of these tokens.
    """
    if old_log_prob < -_FURTHEST and not bool(behaviour_log_prob[counted].any()):
        raise TrustRegionError(
            f"behaviour_log_prob is 0 at all {int(counted.sum())} tokens that count, which is a "
            f"probability of 1. The present policy has {old_log_prob:.3g} there on average. Pass "
            "the log-probabilities of what drew these tokens. If they are 0 because a mask left "
            "these tokens out, one of the two masks is inverted: it must be true for responses."
        )


def penalty_weight(weight: float | None, reference: Tensor | None) -> float:
    """Return the weight of the penalty to a reference policy, 0 without one."""
    if weight is None:
        if reference is None:
            return 0.0
        raise TrustRegionError(
            "reference_log_prob is given and reference_weight is not, so the penalty has no "
            "weight. Pass both, such as reference_weight=0.05, or leave both out. A weight of 0 "
            "leaves the penalty out."
        )
    if not math.isfinite(weight):
        raise TrustRegionError(f"reference_weight is {weight!r}; it must be a finite number.")
    if weight and reference is None:
        raise TrustRegionError(
            f"reference_weight is {weight!r} and reference_log_prob is None. Pass the reference "
            "policy's log-probabilities of the tokens."
        )
    return weight
