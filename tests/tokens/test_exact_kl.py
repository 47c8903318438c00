"""The exact KL over events and its derivatives, in pieces of rows."""

from __future__ import annotations

import gc
import math
import weakref
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.autograd import gradcheck, gradgradcheck
from torch.utils.checkpoint import checkpoint

from trpo_optim.tokens import log_prob
from trpo_optim.tokens.exact_kl import exact_kl
from trpo_optim.tokens.log_prob import in_pieces

ROWS, EVENTS = 7, 6


@pytest.fixture(autouse=True)
def small_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let a piece hold two rows."""
    monkeypatch.setitem(log_prob._PIECE, "cpu", 2 * EVENTS)


def policies(*, ruled_out: bool = False) -> tuple[Tensor, Tensor]:
    torch.manual_seed(0)
    old, logits = torch.randn(2, ROWS, EVENTS, dtype=torch.float64)
    if ruled_out:
        out = torch.eye(ROWS, EVENTS).bool()
        old, logits = (each.masked_fill(out, -math.inf) for each in (old, logits))
    return old.log_softmax(-1), logits.requires_grad_()


def in_pieces_of(old: Tensor, logits: Tensor) -> tuple[Tensor, Tensor]:
    assert len(in_pieces(logits)) == 4
    return exact_kl(old, logits, log_probabilities=False)


def by_torch(old: Tensor, logits: Tensor) -> tuple[Tensor, Tensor]:
    chances, apart = old.exp(), old - logits.log_softmax(-1)
    return logits.logsumexp(-1), chances.mul(apart.masked_fill(chances == 0, 0)).sum(-1)


@pytest.mark.parametrize("ruled_out", [False, True])
@pytest.mark.parametrize("which", [0, 1])
def test_values_and_slopes_are_those_of_torch(which: int, ruled_out: bool) -> None:
    old, logits = policies(ruled_out=ruled_out)
    weights = torch.randn(ROWS).double()
    found = []
    for function in (in_pieces_of, by_torch):
        value = function(old, logits)[which]
        found.append((value, *torch.autograd.grad((weights * value).sum(), [logits])))
    for ours, theirs in zip(*found, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-12)


@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated:DeprecationWarning")
def test_derivatives_of_first_and_second_order_are_those_of_differences() -> None:
    old, logits = policies()
    assert gradcheck(lambda each: in_pieces_of(old, each), [logits], check_forward_ad=True)
    assert gradgradcheck(lambda each: in_pieces_of(old, each), [logits])


def test_torch_func_takes_the_hessian() -> None:
    old, logits = policies()
    hessians = []
    for function in (in_pieces_of, by_torch):

        def weighed(each: Tensor, function: Any = function) -> Any:
            total, kl = function(old, each)
            return (total * kl).sum()

        def slope(each: Tensor, weighed: Any = weighed) -> Any:
            return torch.func.grad(weighed)(each).sum()

        hessians.append(torch.func.grad(slope)(logits.detach()))
    torch.testing.assert_close(*hessians, rtol=0, atol=1e-12)


def test_the_backward_pass_keeps_old_and_present_logits_alone() -> None:
    old, logits = policies()
    kept: list[Tensor] = []

    def keep(each: Tensor) -> int:
        kept.append(each)
        return len(kept) - 1

    with torch.autograd.graph.saved_tensors_hooks(keep, kept.__getitem__):
        in_pieces_of(old, logits)
    assert [each.shape for each in kept] == [(ROWS, EVENTS)] * 2


def test_a_checkpoint_leaves_nothing_to_the_garbage_collector() -> None:
    old, logits = policies()
    made: list[Any] = []

    def last(each: Tensor) -> tuple[Tensor, Tensor]:
        doubled = 2 * each
        made.append(weakref.ref(doubled))
        return in_pieces_of(old, doubled)

    gc.disable()
    try:
        _, kl = checkpoint(last, logits, use_reentrant=False)
        torch.autograd.grad(kl.sum(), [logits])
        del kl
        assert [each() for each in made] == [None, None]
    finally:
        gc.enable()
