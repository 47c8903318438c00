"""The exact KL over events, and what normalises their logits, without tensors of their size."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function

from trpo_optim.tokens.log_prob import in_pieces

__all__ = ["exact_kl"]


def exact_kl(old: Tensor, logits: Tensor, *, log_probabilities: bool) -> tuple[Tensor, Tensor]:
    """Return ln Σ exp of the logits of events, and KL(old ‖ present) over these events.

    Many logits are taken a few rows at a time. A gradient then needs no other tensor of their size
    than old and present logits. Second derivatives do.

    Args:
        old: ln π of the old policy, normalised, (m, E). It is a constant.
        logits: Of the present policy, (m, E).
        log_probabilities: Whether they are to be in the graph, even of many logits.

    Returns:
        Two tensors, (m,) each.
    """
    if torch.is_grad_enabled() and (log_probabilities or len(in_pieces(logits)) == 1):
        total = logits.logsumexp(-1, keepdim=True)
        return total[:, 0], _kl(old, logits - total)
    total, kl = _ExactKL.apply(old, logits)  # type: ignore[no-untyped-call]  # torch's own
    return total, kl


class _ExactKL(Function):
    """The two sums, and their derivatives of all orders."""

    @staticmethod
    def forward(old: Tensor, logits: Tensor) -> tuple[Tensor, Tensor]:
        totals, kls = [], []
        for before, now in _pieces(old, logits):
            total = now.logsumexp(-1, keepdim=True)
            totals.append(total[:, 0])
            kls.append(_kl(before, now - total))
        return torch.cat(totals), torch.cat(kls)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor], _: tuple[Tensor, Tensor]) -> None:
        ctx.save_for_backward(*inputs)  # with an output, what a checkpoint drops would be a cycle
        ctx.save_for_forward(*inputs)

    @staticmethod
    def backward(ctx: Any, of_total: Tensor, of_kl: Tensor) -> tuple[None, Tensor]:
        old, logits = ctx.saved_tensors
        present, before = (of_total + of_kl)[:, None], of_kl[:, None]
        if torch.is_grad_enabled():  # to be differentiated again
            return None, present * logits.softmax(-1) - before * old.exp()
        gradient = torch.empty_like(logits)
        for here, now, then, weight, share in _pieces(gradient, logits, old, present, before):
            torch.softmax(now, -1, out=here).mul_(weight).sub_(then.exp().mul_(share))
        return None, gradient

    @staticmethod
    def jvp(ctx: Any, _: None, change: Tensor) -> tuple[Tensor, Tensor]:
        old, logits = ctx.saved_tensors
        chances = logits.softmax(-1)
        return (chances * change).sum(-1), ((chances - old.exp()) * change).sum(-1)


def _pieces(*rows: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """Return tensors, (m, …), in the pieces of the first."""
    size = len(in_pieces(rows[0])[0])
    return zip(*(each.split(size) for each in rows), strict=True)


def _kl(old: Tensor, new: Tensor) -> Tensor:
    """Return Σ p (ln p − ln q) over the last dimension, in which p = 0 adds nothing.

    Args:
        old: ln p, normalised.
        new: ln q, normalised.
    """
    chances = old.exp()
    kl = chances.mul(old - new).sum(-1)
    if not kl.isnan().any():
        return kl
    out = chances == 0  # times infinity is no number
    return chances.mul((old - new).masked_fill(out, 0)).sum(-1)
