"""Losses and KLs of tokens that some policy drew, from their log-probabilities."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from trpo_optim.distributions.arguments import require_beside
from trpo_optim.distributions.masks import Per, checked_mask, masked_mean, require_fit, require_per
from trpo_optim.distributions.precision import widened

__all__ = ["reference_kl", "token_surrogate", "weighted_excess"]


def token_surrogate(
    new_log_prob: Tensor,
    behaviour_log_prob: Tensor,
    advantages: Tensor,
    mask: Tensor | None = None,
    *,
    per: Per = "token",
) -> Tensor:
    """Return the surrogate loss of tokens, −mean(π_new/π_behaviour · A).

    The behaviour policy is what drew the tokens: the old policy, an earlier policy, or an inference
    server whose rounding differs from the trainer's. Its log-probabilities belong in this ratio. Do
    not use them as the old policy of the KL, which starts from the present policy.

    Args:
        new_log_prob: ln π_new of the tokens, with its graph, shape (N, T).
        behaviour_log_prob: ln π_behaviour of the tokens, without a graph, shape (N, T).
        advantages: One number per sequence, (N,), or per token, (N, T).
        mask: True where a token counts, shape (N, T). None: all count.
        per: ``"token"``: the mean over all tokens that count. ``"sequence"``: the mean over
            sequences of the sum over their tokens that count.

    Returns:
        A scalar to minimise.

    Raises:
        TrustRegionError: If the shapes do not fit, the mask or ``per`` does not fit, or an argument
            other than ``new_log_prob`` requires grad.

    Example:
        >>> import torch
        >>> from trpo_optim.tokens import token_surrogate
        >>> behaviour = torch.tensor([[0.5, 0.5], [0.5, 1.0]]).log()
        >>> new = torch.tensor([[0.25, 0.75], [0.5, 1.0]]).log()
        >>> mask = torch.tensor([[True, True], [True, False]])
        >>> token_surrogate(new, behaviour, torch.tensor([1.0, -1.0]), mask)
        tensor(-0.3333)

    Source:
        Schulman et al., "Trust Region Policy Optimization" (2015), equation 14.
    """
    if advantages.dim() == 1 and advantages.shape == new_log_prob.shape[:1]:
        advantages = advantages.view(-1, *[1] * (new_log_prob.dim() - 1)).expand_as(new_log_prob)
    counted = _counted(
        new_log_prob, mask, per, behaviour_log_prob=behaviour_log_prob, advantages=advantages
    )
    ratio = _log_ratio(new_log_prob, behaviour_log_prob, counted).exp()
    return -masked_mean(ratio * advantages, counted, per)


def reference_kl(
    new_log_prob: Tensor,
    reference_log_prob: Tensor,
    behaviour_log_prob: Tensor,
    mask: Tensor | None = None,
    *,
    per: Per = "token",
) -> Tensor:
    """Estimate KL(π_new ‖ π_reference), a penalty for the loss, on tokens of the behaviour policy.

    With w = π_new/π_behaviour and ρ = π_reference/π_new, it is the mean of w (ρ − 1 − ln ρ). Both
    factors depend on the new policy. Value and gradient are unbiased for the KL of each next token,
    after prefixes that the behaviour policy drew.

    Without the factor w, or with w as a constant, the gradient is wrong. Where π_new = π_behaviour,
    the expected gradient of the mean of ρ − 1 − ln ρ is the gradient of KL(π_reference ‖ π_new).
    The expected gradient of the mean of −ln ρ is zero.

    Args:
        new_log_prob: ln π_new of the tokens, with its graph, shape (N, T).
        reference_log_prob: ln π_reference of the tokens, without a graph, shape (N, T).
        behaviour_log_prob: ln π of the policy that drew the tokens, without a graph, shape (N, T).
        mask: True where a token counts, shape (N, T). None: all count.
        per: As for ``token_surrogate``.

    Returns:
        A scalar, in nats.

    Raises:
        TrustRegionError: If the shapes do not fit, the mask or ``per`` does not fit, or an argument
            other than ``new_log_prob`` requires grad.

    Example:
        >>> import torch
        >>> from trpo_optim.tokens import reference_kl
        >>> new, reference = torch.tensor([[0.6, 0.4], [0.5, 0.5]]).log()
        >>> behaviour = torch.tensor([0.5, 0.5]).log()  # drew both tokens of the vocabulary once
        >>> reference_kl(new, reference, behaviour)  # 0.6 ln(0.6/0.5) + 0.4 ln(0.4/0.5)
        tensor(0.0201)

    Source:
        Schulman, "Approximating KL divergence" (2020), joschu.net/blog/kl-approx.html, for
        ρ − 1 − ln ρ.
    """
    counted = _counted(
        new_log_prob,
        mask,
        per,
        reference_log_prob=reference_log_prob,
        behaviour_log_prob=behaviour_log_prob,
    )
    return weighted_excess(new_log_prob, reference_log_prob, behaviour_log_prob, counted, per)


def weighted_excess(
    log_p: Tensor, log_q: Tensor, log_base: Tensor, mask: Tensor | None, per: Per
) -> Tensor:
    """Return an estimate of KL(p ‖ q) on actions that a third policy b drew.

    It is the mean of w (r − 1 − ln r), with w = p/b and r = q/p. Where p is 0, this is q/b.

    Args:
        log_p: ln p, (N, T).
        log_q: ln q, (N, T).
        log_base: ln b, (N, T).
        mask: True where an element counts. None: all count.
        per: As for ``token_surrogate``.
    """
    never = log_p == -math.inf
    log_ratio = _log_ratio(log_q, log_p, mask).masked_fill(never, 0)
    excess = _log_ratio(log_p, log_base, mask).exp() * (torch.expm1(log_ratio) - log_ratio)
    rest = _log_ratio(log_q, log_base, mask).masked_fill(~never, -math.inf).exp()
    return masked_mean(excess + rest, mask, per)


def _log_ratio(above: Tensor, below: Tensor, counted: Tensor | None) -> Tensor:
    """Return the difference of log-probabilities, 0 where the mask is false."""
    difference = widened(above, torch.float32) - widened(below, torch.float32)
    return difference if counted is None else difference.masked_fill(~counted, 0)


def _counted(
    new_log_prob: Tensor, mask: Tensor | None, per: Per, **others: Tensor
) -> Tensor | None:
    """Return the mask as one of bools, after checking all arguments."""
    require_per(per)
    require_beside(new_log_prob, others, called="new log-probabilities", unit="token")
    counted = checked_mask(mask)
    if counted is not None:
        require_fit(counted, new_log_prob)
    return counted
