"""Rounding is no fault: the kit passes sound policies that it hides, or says that it hides them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributions import Categorical, Distribution, Independent, Normal

from trpo_optim import entropy, frozen, joint_kl, log_prob, mean_kl
from trpo_optim.testing import ClosureReport, Verdict, check_closure

pytestmark = pytest.mark.no_cover

HALF = [torch.bfloat16, torch.float16]


class Small(nn.Module):
    """A network whose outputs, in its own precision, any family takes."""

    def __init__(self, family: Callable[[Tensor, Tensor], Any], outputs: int = 6) -> None:
        super().__init__()
        self.network = nn.Sequential(nn.Linear(4, 64), nn.Tanh(), nn.Linear(64, outputs))
        self.free, self.family = nn.Parameter(torch.zeros(3)), family

    def forward(self, observations: Tensor) -> Any:
        return self.family(self.network(observations), self.free)


def gaussian(outputs: Tensor, free: Tensor) -> Distribution:
    return Independent(Normal(outputs[:, :3], free.exp()), 1)


def categorical(outputs: Tensor, free: Tensor) -> Distribution:
    return Categorical(logits=outputs)


FAMILIES: dict[str, Any] = {
    "gaussian": gaussian,
    "categorical": categorical,
    "sharp": lambda outputs, free: Categorical(logits=20 * outputs),
}


def told(policy: nn.Module, dtype: torch.dtype, rows: int, kl: Any = mean_kl) -> ClosureReport:
    """Return what check_closure finds in the closure of README, or in one with another KL."""
    policy, observations = policy.to(dtype), torch.randn(rows, 4).to(dtype)
    with torch.no_grad():
        old = frozen(policy(observations))
        actions = old.sample()
    advantages = torch.randn(rows)

    def closure() -> Any:
        new = policy(observations)
        ratio = (log_prob(new, actions) - log_prob(old, actions)).exp()
        return -(ratio * advantages).mean(), kl(old, new), new

    return check_closure(
        closure,
        policy.parameters(),
        log_prob=lambda: log_prob(policy(observations), actions),
        advantages=advantages,
    )


@pytest.mark.parametrize("dtype", HALF)
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("rows", [4, 256])
def test_a_sound_closure_in_half_precision_passes(
    family: str, dtype: torch.dtype, rows: int
) -> None:
    for seed in range(2):
        torch.manual_seed(seed)
        report = told(Small(FAMILIES[family]), dtype, rows)
        assert report.passed, str(report)
        assert report["kl"].verdict is Verdict.PASSED or rows < 16, str(report)


@pytest.mark.parametrize("dtype", HALF)
def test_a_kl_of_the_wrong_sign_is_found_in_half_precision(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    report = told(Small(gaussian), dtype, 256, lambda old, new: -joint_kl(old, new).mean())
    assert "does not rise" in report["kl"].cause


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.float64])
def test_a_kl_with_a_slope_is_found(dtype: torch.dtype) -> None:
    def with_entropy(old: Any, new: Any) -> Tensor:
        return joint_kl(old, new).mean() + 0.1 * (entropy(old) - entropy(new)).mean()

    torch.manual_seed(1)
    report = told(Small(categorical), dtype, 256, with_entropy)
    assert report["kl"].verdict is Verdict.FAILED, str(report)
    assert "slope" in report["kl"].cause
