"""Steps that were once accepted and wrong, or ended in an error of torch's own."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributions import (
    Categorical,
    Independent,
    MultivariateNormal,
    Normal,
)

from trpo_optim import (
    StepReport,
    TrustRegionError,
    TrustRegionOptimizer,
    frozen,
    joint_kl,
    log_prob,
    mean_kl,
)


class Gaussian(nn.Module):
    """A linear Gaussian policy, and a batch that it drew."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.mean = nn.Linear(3, 2)
        self.log_std = nn.Parameter(torch.full((2,), -0.5))
        self.seen = torch.randn(64, 3)
        with torch.no_grad():
            self.actions = self().sample()
        self.advantages = torch.randn(64)

    def forward(self) -> Any:
        return Independent(Normal(self.mean(self.seen), self.log_std.exp()), 1)

    def step(self, old: Callable[[Tensor], Any], third: bool = True, **settings: Any) -> StepReport:
        """Take a step whose old policy is made in each evaluation, given its mean."""
        with torch.no_grad():
            mean, before = self.mean(self.seen), self().log_prob(self.actions)

        def closure() -> Any:
            dist = self()
            ratio = (dist.log_prob(self.actions) - before).exp()
            loss, kl = -(ratio * self.advantages).mean(), mean_kl(old(mean), dist)
            return (loss, kl, dist) if third else (loss, kl)

        return TrustRegionOptimizer(self.parameters(), **settings).step(closure)


@pytest.mark.parametrize("third", [False, True])
@pytest.mark.parametrize("detached", [lambda each: each.detach(), lambda each: each.data])
def test_a_part_of_the_old_policy_made_inside_the_closure_is_named(
    detached: Callable[[Tensor], Tensor], third: bool
) -> None:
    policy = Gaussian()

    def old(mean: Tensor) -> Any:
        return Independent(Normal(mean, detached(policy.log_std).exp()), 1)

    with pytest.raises(TrustRegionError, match=r"stays at 0 however far parameter 0, counted from"):
        policy.step(old, third)


@pytest.mark.parametrize("start", [0, 1])
def test_memory_that_came_through_numpy_is_found(start: int) -> None:
    policy = Gaussian()
    flat = torch.zeros(5)
    policy.log_std = nn.Parameter(flat[3:])
    view = torch.from_numpy(policy.log_std.detach().numpy()[start:])

    def old(mean: Tensor) -> Any:
        std = torch.cat([torch.ones(start), view.exp()])
        return Independent(Normal(mean, std), 1)

    with pytest.raises(TrustRegionError, match="shares memory with a parameter"):
        policy.step(old)


def gain_of(policy: Callable[[], Any], loss: Callable[[], Tensor], *tensors: Tensor) -> Any:
    """Return the report of an undamped step on a linear loss."""
    old = frozen(policy())
    optimizer = TrustRegionOptimizer(tensors, damping=0.0, cg_iterations=20)

    def closure() -> Any:
        dist = policy()
        return loss(), mean_kl(old, dist), dist

    return optimizer.step(closure)


def pair(tensors: list[Tensor]) -> tuple[Tensor, Tensor]:
    a, b = (each.requires_grad_() for each in tensors)
    return a, b


@pytest.mark.parametrize("std", [1.0, 1e-2, 1e-3])
def test_correlated_parts_are_found_beside_much_narrower_ones(std: float) -> None:
    a, b = pair([torch.zeros(2), torch.zeros(2)])
    covariance = torch.tensor([[1.0, 0.95], [0.95, 1.0]])
    slope, other = torch.tensor([1.0, -0.5]) / std, torch.tensor([1.0, 0.0])

    def policy() -> Any:
        narrow = Independent(Normal(a.expand(8, 2), std), 1)
        return narrow, MultivariateNormal(b.expand(8, 2), covariance)

    report = gain_of(policy, lambda: -(a @ slope + b @ other), a, b)
    squares = (slope * std).square().sum() + other @ covariance @ other
    expected = math.sqrt(2 * report.kl * float(squares))
    assert report.engine == "Gauss-Newton"
    assert report.improvement == pytest.approx(expected, rel=1e-3)


@pytest.mark.parametrize("ratio", [0.7, 0.5, 0.3])
def test_two_correlated_gaussians_are_not_taken_for_mean_and_scale(ratio: float) -> None:
    a, b = pair([torch.zeros(2), torch.zeros(2)])
    covariance = torch.tensor([[1.0, 0.8], [0.8, 1.0]])

    def policy() -> Any:
        one = MultivariateNormal(a.expand(4, 2), covariance)
        return one, MultivariateNormal(b.expand(4, 2), ratio * covariance)

    report = gain_of(policy, lambda: -(a[0] + b[1]), a, b)
    assert report.engine == "Gauss-Newton"
    assert report.improvement == pytest.approx(math.sqrt(2 * report.kl * (1 + ratio)), rel=1e-3)


def test_a_complex_third_value_leaves_the_step_to_another_engine() -> None:
    torch.manual_seed(0)
    weights = nn.Parameter(torch.randn(3, 4, 2))
    seen, actions, advantages = torch.randn(32, 3), torch.randint(4, (32,)), torch.randn(32)

    def policy() -> tuple[Categorical, Tensor]:
        amplitudes = seen.to(torch.complex64) @ torch.view_as_complex(weights)
        return Categorical(probs=amplitudes.abs().square()), amplitudes

    old = frozen(policy()[0])

    def closure() -> Any:
        dist, amplitudes = policy()
        ratio = (log_prob(dist, actions) - log_prob(old, actions)).exp()
        return -(ratio * advantages).mean(), mean_kl(old, dist), amplitudes

    report = TrustRegionOptimizer([weights]).step(closure)
    assert report.accepted
    assert "complex" in report.fallback


def test_parameters_made_in_inference_mode_are_refused() -> None:
    with torch.inference_mode():
        parameter = nn.Parameter(torch.zeros(2))
    with pytest.raises(
        TrustRegionError, match=r"Parameter 0 was made in inference mode.*clone\(\)"
    ):
        TrustRegionOptimizer([parameter])


def test_a_saved_state_with_an_invalid_value_changes_nothing() -> None:
    optimizer = TrustRegionOptimizer([nn.Parameter(torch.zeros(2))])
    saved = optimizer.state_dict()
    saved["param_groups"][0]["max_kl"] = -1.0
    with pytest.raises(TrustRegionError, match="max_kl is -1"):
        TrustRegionOptimizer([nn.Parameter(torch.zeros(2))]).load_state_dict(saved)
    with pytest.raises(TrustRegionError, match="max_kl is -1"):
        optimizer.load_state_dict(saved)
    assert optimizer.param_groups[0]["max_kl"] == 0.01


def test_as_many_iterations_as_one_likes_take_no_memory_in_advance() -> None:
    policy = Gaussian()
    wide = nn.Parameter(torch.zeros(200_000))

    def closure() -> Any:
        dist = Independent(Normal(policy.mean(policy.seen) + wide.mean(), policy.log_std.exp()), 1)
        loss = -(dist.log_prob(policy.actions) * policy.advantages).mean()
        return loss, mean_kl(old, dist), dist

    with torch.no_grad():
        old = frozen(policy())
    parameters = [*policy.parameters(), wide]
    assert TrustRegionOptimizer(parameters, cg_iterations=10**6).step(closure).accepted


def test_a_largest_kl_that_is_missing_in_trials_is_named() -> None:
    policy = Gaussian()
    with torch.no_grad():
        old, before = frozen(policy()), policy().log_prob(policy.actions)

    def closure() -> Any:
        dist = policy()
        loss = -((dist.log_prob(policy.actions) - before).exp() * policy.advantages).mean()
        kl = joint_kl(old, dist)
        return loss, kl if torch.is_grad_enabled() else kl.mean(), dist

    start = policy.log_std.detach().clone()
    with pytest.raises(TrustRegionError, match="constraint is 'max', and the closure's KL is a sc"):
        TrustRegionOptimizer(policy.parameters(), constraint="max").step(closure)
    assert torch.equal(policy.log_std, start)


@pytest.mark.parametrize("offset", [0.0, 1e2, 1e3])
def test_finite_differences_see_through_the_rounding_of_large_parameters(offset: float) -> None:
    torch.manual_seed(0)
    weights = nn.Parameter(torch.randn(4, 5) + offset)
    start, seen = weights.detach().clone(), torch.randn(256, 4)
    pull = torch.randn(256, 5) + seen @ torch.randn(4, 5)

    def policy() -> Any:
        return Independent(Normal(seen @ (weights - start), 1.0), 1)

    old = frozen(policy())

    def closure() -> Any:
        dist = policy()
        return -(dist.mean * pull).mean(0).sum(), mean_kl(old, dist)

    optimizer = TrustRegionOptimizer([weights], engine="finite differences", damping=0.0)
    report = optimizer.step(closure)
    slope, fisher = (seen.T @ pull / 256).double(), (seen.T @ seen / 256).double()
    expected = math.sqrt(2 * report.kl * float((slope * torch.linalg.solve(fisher, slope)).sum()))
    assert report.improvement == pytest.approx(expected, rel=0.02)
    assert report.predicted_kl == pytest.approx(report.kl, rel=0.1)


def test_finite_differences_that_rounding_hides_are_refused_and_judge_nothing() -> None:
    policy = Gaussian()
    with torch.no_grad():
        policy.mean.bias.add_(1e5)
    before = frozen(policy())
    policy.actions = before.sample()
    with pytest.raises(TrustRegionError, match="its parameters are large beside the moves"):
        policy.step(lambda _: before, engine="finite differences")
    report = policy.step(lambda _: before)
    assert report.engine == "Gauss-Newton"
    assert not report.fallback


@pytest.mark.parametrize("third", [False, True])
@pytest.mark.parametrize("weigh", [lambda kl: kl.mean(), lambda kl: (2.0 * kl).sum() / (2 * 64)])
def test_a_kl_that_is_cast_after_it_was_computed_counts_as_it_was_computed(
    weigh: Callable[[Tensor], Tensor], third: bool
) -> None:
    policy = Gaussian()

    def in_half() -> Any:
        mean, std = policy.mean(policy.seen).bfloat16(), policy.log_std.exp().bfloat16()
        return Normal(mean, std)

    with torch.no_grad():
        old, before = frozen(in_half()), policy().log_prob(policy.actions)

    def closure(cast: Callable[[Tensor], Tensor]) -> Any:
        dist = in_half()
        ratio = (policy().log_prob(policy.actions) - before).exp()
        kl = cast(torch.distributions.kl_divergence(old, dist).sum(-1))
        return (-(ratio * policy.advantages).mean(), kl, dist)[: 2 + third]

    optimizer = TrustRegionOptimizer(policy.parameters())
    with pytest.raises(TrustRegionError, match=r"precision of the closure's KL resolves 0\.39"):
        optimizer.step(lambda: closure(lambda kl: weigh(kl.float())))


def test_frozen_parameters_may_come_from_inference_mode() -> None:
    with torch.inference_mode():
        encoder = nn.Linear(3, 3).requires_grad_(False)
    policy = Gaussian()
    optimizer = TrustRegionOptimizer([*encoder.parameters(), *policy.parameters()])
    assert len(optimizer.param_groups[0]["params"]) == 5
