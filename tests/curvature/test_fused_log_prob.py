"""Kernels that make log-probabilities and their slopes at once, as fused losses of tokens do."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import Function

from trpo_optim import StepReport, TrustRegionOptimizer, sampled_kl

TOKENS, WIDTH, VOCABULARY = 64, 6, 11


class FusedLogProb(Function):
    """Log-probabilities of tokens; the slopes are made in the forward, into memory of its own."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, tokens: Tensor) -> Tensor:
        logits = torch.empty(len(hidden), len(weight), dtype=hidden.dtype)
        torch.mm(hidden, weight.T, out=logits)
        logs = logits.log_softmax(-1)
        ctx.save_for_backward(hidden, weight, logs.exp(), tokens)
        return logs.gather(-1, tokens[:, None]).squeeze(-1)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, None]:
        hidden, weight, probabilities, tokens = ctx.saved_tensors
        slope = -probabilities * grads[0][:, None]
        slope[torch.arange(len(tokens)), tokens] += grads[0]
        of_hidden, of_weight = torch.empty_like(hidden), torch.empty_like(weight)
        torch.mm(slope, weight, out=of_hidden)
        torch.mm(slope.T, hidden, out=of_weight)
        return of_hidden, of_weight, None


fused_log_prob: Any = FusedLogProb.apply


def step(fused: bool) -> tuple[StepReport, Tensor]:
    """Take one step on sampled tokens; return its report and the parameters."""
    torch.manual_seed(0)
    body = nn.Linear(3, WIDTH).double()
    weight = nn.Parameter(torch.randn(VOCABULARY, WIDTH, dtype=torch.float64))
    observations = torch.randn(TOKENS, 3, dtype=torch.float64)
    tokens, advantages = torch.randint(VOCABULARY, (TOKENS,)), torch.randn(TOKENS).double()

    def log_prob() -> Tensor:
        hidden = body(observations).tanh()
        if fused:
            result: Tensor = fused_log_prob(hidden, weight, tokens)
            return result
        logs: Tensor = (hidden @ weight.T).log_softmax(-1).gather(-1, tokens[:, None])
        return logs.squeeze(-1)

    with torch.no_grad():
        old = log_prob()

    def closure() -> tuple[Tensor, Tensor, Tensor]:
        new = log_prob()
        kl = sampled_kl(old, new, low_variance=True)
        return -((new - old).exp() * advantages).mean(), kl, new

    parameters = [*body.parameters(), weight]
    report = TrustRegionOptimizer(parameters).step(closure)
    return report, torch.cat([each.detach().flatten() for each in parameters])


def test_a_fused_kernel_takes_the_step_of_a_plain_one() -> None:
    plain, expected = step(fused=False)
    report, parameters = step(fused=True)
    assert plain.engine == "Gauss-Newton"
    assert report.engine == "finite differences"
    assert report.fallback
    assert report.accepted
    torch.testing.assert_close(parameters, expected, rtol=0, atol=1e-4)
