"""Rounding is no fault: the kit passes sound policies that it hides, or says that it hides them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributions import Beta, Categorical, Distribution, Independent, Normal
from torch.nn.functional import softplus

from trpo_optim import entropy, frozen, joint_kl, log_prob, mean_kl
from trpo_optim.testing import ClosureReport, PolicyReport, Verdict, check_closure, check_policy

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


SHARP: dict[str, Any] = {
    "log_std -10": lambda outputs, free: gaussian(outputs, free - 10),
    "log_std -12": lambda outputs, free: gaussian(outputs, free - 12),
    "Beta of concentrations 1000": lambda outputs, free: Independent(
        Beta(1e3 * softplus(outputs[:, :3]) + 1, 1e3 * softplus(outputs[:, 3:]) + 1), 1
    ),
}


def policy_report(policy: nn.Module, observations: Tensor, *, whole: bool) -> PolicyReport:
    """Return what check_policy finds in a module, or in a function that it cannot widen."""
    if whole:
        return check_policy(policy, observations)
    return check_policy(lambda seen: policy(seen), observations, parameters=policy.parameters())


@pytest.mark.parametrize("whole", [True, False], ids=["a module", "a function"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("family", SHARP)
def test_a_policy_that_is_nearly_deterministic_is_sound(
    family: str, dtype: torch.dtype, whole: bool
) -> None:
    for seed in range(2):
        torch.manual_seed(seed)
        policy = Small(SHARP[family]).to(dtype)
        report = policy_report(policy, torch.randn(256, 4).to(dtype), whole=whole)
        assert report.passed, str(report)


@pytest.mark.parametrize("size", [300.0, 1000.0])
def test_observations_that_are_not_normalised_are_no_fault(size: float) -> None:
    for seed in range(3):
        torch.manual_seed(seed)
        report = policy_report(Small(gaussian), size * torch.randn(256, 4), whole=False)
        assert report.passed, str(report)


class Leaking(Small):
    """A policy that subtracts a little of the batch's mean."""

    def forward(self, observations: Tensor) -> Any:
        return super().forward(observations - 0.01 * observations.mean(0))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("family", SHARP)
def test_what_goes_across_the_batch_is_found_beside_rounding(
    family: str, dtype: torch.dtype
) -> None:
    torch.manual_seed(0)
    report = policy_report(
        Leaking(SHARP[family]).to(dtype), torch.randn(256, 4).to(dtype), whole=True
    )
    assert report["rows"].verdict is Verdict.FAILED, str(report)


class Doubled(torch.autograd.Function):
    """The identity, whose gradient is twice what it should be."""

    @staticmethod
    def forward(x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Tensor) -> None:
        pass

    @staticmethod
    def backward(ctx: Any, *slopes: Tensor) -> Any:
        return 2 * slopes[0]


@pytest.mark.parametrize("family", ["log_std -10", "Beta of concentrations 1000"])
def test_a_wrong_gradient_is_found_beside_rounding(family: str) -> None:
    doubled: Callable[[Tensor], Tensor] = Doubled.apply

    def wrong(outputs: Tensor, free: Tensor) -> Any:
        return SHARP[family](doubled(outputs), free)

    torch.manual_seed(0)
    report = policy_report(Small(wrong), torch.randn(256, 4), whole=False)
    assert report["fisher"].verdict is Verdict.FAILED, str(report)
