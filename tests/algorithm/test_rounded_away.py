"""Parameters in half precision that are too coarse for a step."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributions import Categorical

from trpo_optim import Outcome, StepReport, TrustRegionOptimizer, frozen, mean_kl

HALF = [torch.bfloat16, torch.float16]


class Batch:
    """A policy in a given precision, whose closure computes in float32."""

    def __init__(self, dtype: torch.dtype, *, size: float = 1.0) -> None:
        torch.manual_seed(0)
        self.policy = nn.Linear(16, 8)
        with torch.no_grad():
            self.policy.weight.mul_(4 * size)
            self.policy.bias.copy_(size * torch.randn(8))
        self.policy.to(torch.bfloat16).to(dtype)  # numbers that all of these hold
        self.observations = torch.randn(128, 16)
        self.observations[:, :2] = 0  # a quarter of the weights has no slope
        self.actions, self.advantages = torch.randint(8, (128,)), torch.randn(128)
        with torch.no_grad():
            self.old = frozen(self.dist())

    def dist(self) -> Categorical:
        weight, bias = self.policy.weight.float(), self.policy.bias.float()
        return Categorical(logits=nn.functional.linear(self.observations, weight, bias))

    def closure(self) -> tuple[Tensor, Tensor, Any]:
        new = self.dist()
        ratio = (new.log_prob(self.actions) - self.old.log_prob(self.actions)).exp()
        return -(ratio * self.advantages).mean(), mean_kl(self.old, new), new

    def vector(self) -> Tensor:
        return torch.cat([each.detach().float().flatten() for each in self.policy.parameters()])

    def step(self, **settings: Any) -> StepReport:
        return TrustRegionOptimizer(self.policy.parameters(), **settings).step(self.closure)


@pytest.mark.parametrize("rate", [1e-3, 3e-2, 1.0])
@pytest.mark.parametrize("dtype", [torch.float32, *HALF])
def test_the_report_counts_what_was_to_move_and_did_not(dtype: torch.dtype, rate: float) -> None:
    batch = Batch(dtype)
    before = batch.vector()
    slopes = torch.autograd.grad(batch.closure()[0], list(batch.policy.parameters()))
    wanted = torch.cat([each.float().flatten() for each in slopes]) != 0
    assert int((~wanted).sum()) == 16
    report = batch.step(mode="vanilla", lr=rate)
    still = wanted & (batch.vector() == before)
    assert report.rounded_away == pytest.approx(int(still.sum()) / int(wanted.sum()), abs=1e-12)
    if dtype is torch.float32:
        assert report.rounded_away < 0.02
    else:
        assert report.rounded_away > (0.1 if rate < 0.1 else 0.01)
    assert (f"{report.rounded_away:.0%} rounded away" in str(report)) == (report.rounded_away > 0.5)


@pytest.mark.parametrize("dtype", HALF)
def test_the_radius_holds_for_the_rounded_parameters(dtype: torch.dtype) -> None:
    batch = Batch(dtype)
    max_kl = 1e-5
    report = batch.step(max_kl=max_kl)
    assert report.accepted
    assert 0.001 < report.rounded_away < 0.9
    with torch.no_grad():
        loss, kl, _ = batch.closure()
    assert (report.kl, report.loss_after) == (kl.item(), loss.item())
    assert 0 < report.kl <= max_kl


def test_a_step_of_which_rounding_leaves_nothing_is_rejected_and_says_so() -> None:
    batch = Batch(torch.bfloat16, size=1e4)
    batch.old = frozen(Categorical(logits=torch.zeros(128, 8)))

    def dist() -> Categorical:
        weight, bias = (each.float() for each in batch.policy.parameters())
        with torch.no_grad():
            origin = (before[:128].view(8, 16), before[128:])
        moved = nn.functional.linear(batch.observations, weight - origin[0], bias - origin[1])
        return Categorical(logits=moved)

    before = batch.vector()
    batch.dist = dist  # type: ignore[method-assign]  # a policy whose parameters are far from zero
    report = batch.step(max_kl=1e-4)
    assert report.outcome is Outcome.NO_IMPROVEMENT
    assert (report.rounded_away, report.step_norm, report.trial_kl) == (1.0, 0.0, 0.0)
    assert "rounded_away is near 1" in report.outcome.message
    assert torch.equal(batch.vector(), before)
