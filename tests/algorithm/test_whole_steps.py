"""What a whole step says, keeps and leaves alone, in every mode."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from devices import each_device
from problems import MODES, PROBLEMS, GaussianPolicy, Problem, categorical, gaussian
from profiles import problems
from taken import taken
from torch import Tensor, nn
from torch.distributions import Distribution, Independent, Normal

from trpo_optim import Outcome, TrustRegionError, TrustRegionOptimizer
from trpo_optim.hyperparameters import ModeName

pytestmark = pytest.mark.no_cover


def test_a_step_too_small_for_bfloat16_is_said_to_have_the_length_zero() -> None:
    policy = gaussian(dtype=torch.float32).policy.to(torch.bfloat16)
    with torch.no_grad():
        for parameter in policy.parameters():
            parameter.copy_(torch.ones_like(parameter))
    problem = Problem(policy, torch.randn(64, 4, dtype=torch.bfloat16))
    move, report = taken(problem, mode="vanilla", max_norm=1e-3)
    assert report.accepted
    assert report.step_norm == float(move.norm()) == 0


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("make", PROBLEMS)
def test_the_report_says_what_is_measured_afresh(make: Callable[[], Problem], mode: str) -> None:
    problem = make()
    loss_before = problem.closure()[0].item()
    move, report = taken(problem, mode=mode, lr=0.5)
    with torch.no_grad():
        loss, kl = problem.closure()
    assert (report.loss_before, report.loss_after, report.kl) == (
        loss_before,
        loss.item(),
        kl.item(),
    )
    assert report.improvement == report.loss_before - report.loss_after
    assert report.step_norm == pytest.approx(float(move.norm()), rel=1e-12)
    gradient = make().dense_gradient()
    assert report.gradient_norm == pytest.approx(float(gradient.norm()), rel=1e-12)
    promised = -float(gradient @ move)
    assert report.predicted_improvement == pytest.approx(promised, rel=1e-10)
    if mode != "vanilla":
        predicted = 0.5 * float(move @ make().dense_fisher() @ move)
        assert report.predicted_kl == pytest.approx(predicted, rel=1e-10)


@pytest.mark.parametrize("factor", [1e-30, 1e-6, 1e6, 1e30])
@pytest.mark.parametrize("mode", ["trpo", "natural"])
@pytest.mark.parametrize("make", PROBLEMS)
def test_the_scale_of_the_loss_changes_no_trust_region_step(
    make: Callable[..., Problem], mode: str, factor: float
) -> None:
    plain, scaled = make(dtype=torch.float32), make(dtype=torch.float32)

    def closure() -> tuple[Tensor, Tensor]:
        loss, kl = scaled.closure()
        return factor * loss, kl

    move, report = taken(plain, mode=mode)
    before = scaled.vector()
    other = scaled.optimizer(mode=mode).step(closure)
    torch.testing.assert_close(scaled.vector() - before, move, rtol=1e-4, atol=1e-6)
    assert other.outcome is report.outcome
    assert other.improvement == pytest.approx(factor * report.improvement, rel=1e-3)


@pytest.mark.parametrize("seed", range(problems(share=0.25)))
@pytest.mark.parametrize("make", PROBLEMS)
def test_every_accepted_step_keeps_the_region_and_improves(
    make: Callable[..., Problem], seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)

    def draw(low: int, high: int) -> int:
        return int(torch.randint(low, high, (), generator=generator))

    hidden = draw(72, 320)
    problem = make(
        seed,
        dtype=torch.float32,
        samples=draw(64, 2048),
        observations=draw(8, 24),
        hidden=hidden,
        actions=draw(2, 8),
    )
    assert 1_000 <= len(problem.vector()) <= 11_000
    damping = 10.0 ** -draw(1, 5)
    report = problem.optimizer(damping=damping).step(problem.closure)
    assert report.accepted
    with torch.no_grad():
        loss, kl = problem.closure()
    assert kl <= 0.01
    assert loss < report.loss_before
    if report.backtracks:  # the radius bound the step: little of it may go unused
        assert kl >= 0.009


def test_curvature_and_length_are_joint_over_action_dimensions() -> None:
    problem = gaussian(actions=17)
    _, report = taken(problem, max_kl=0.01, mode="natural")
    assert isinstance(problem.policy, GaussianPolicy)
    new = problem.policy(problem.observations)
    assert isinstance(problem.old, Independent)
    assert isinstance(new, Independent)
    old_base, new_base = problem.old.base_dist, new.base_dist
    assert isinstance(old_base, Normal)
    assert isinstance(new_base, Normal)
    ratio = (old_base.scale / new_base.scale).square()
    distance = ((old_base.loc - new_base.loc) / new_base.scale).square()
    joint = 0.5 * (ratio + distance - 1 - ratio.log()).sum(-1).mean()
    assert report.kl == pytest.approx(joint.item(), rel=1e-9)
    assert report.kl == pytest.approx(0.01, rel=0.25)


class Agent(nn.Module):
    """Actor, critic and log_std in one module, as in CleanRL."""

    def __init__(self) -> None:
        super().__init__()
        self.critic = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 1))
        self.actor_mean = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 2))
        self.actor_logstd = nn.Parameter(torch.zeros(1, 2))

    def get_action_and_value(
        self, observation: Tensor, action: Tensor | None = None
    ) -> tuple[Tensor, Tensor, Distribution, Tensor]:
        mean = self.actor_mean(observation)
        dist = Independent(Normal(mean, self.actor_logstd.expand_as(mean).exp()), 1)
        action = dist.sample() if action is None else action
        return action, dist.log_prob(action), dist, self.critic(observation)


@pytest.mark.parametrize("mode", MODES)
def test_a_critic_handed_over_with_the_actor_stays_untouched(mode: ModeName) -> None:
    def step(only_the_actor: bool) -> tuple[Agent, Agent]:
        torch.manual_seed(0)
        agent, start = Agent(), Agent()
        start.load_state_dict(agent.state_dict())
        observations = torch.randn(32, 4)
        with torch.no_grad():
            actions, old_log_prob, old, _ = agent.get_action_and_value(observations)
        advantages = torch.randn(32)

        def closure() -> tuple[Tensor, Tensor]:
            _, log_prob, dist, _ = agent.get_action_and_value(observations, actions)
            kl = torch.distributions.kl_divergence(old, dist).mean()
            return -((log_prob - old_log_prob).exp() * advantages).mean(), kl

        actor = [*agent.actor_mean.parameters(), agent.actor_logstd]
        params = actor if only_the_actor else agent.parameters()
        assert TrustRegionOptimizer(params, mode=mode, lr=1.0).step(closure).accepted
        return agent, start

    agent, start = step(only_the_actor=False)
    alone, _ = step(only_the_actor=True)
    for ours, theirs in zip(agent.critic.parameters(), start.critic.parameters(), strict=True):
        assert torch.equal(ours, theirs)
    torch.testing.assert_close(agent.state_dict(), alone.state_dict(), rtol=1e-5, atol=1e-7)
    assert not torch.equal(agent.actor_logstd, start.actor_logstd)


@pytest.mark.parametrize("third", [False, True])
@pytest.mark.parametrize("mode", ["trpo", "natural"])
def test_a_parameter_in_the_loss_but_not_in_the_kl_is_an_error(mode: Any, third: bool) -> None:
    """Such as a critic's: nothing but the damping would say how far it goes."""
    problem = gaussian()
    critic = nn.Linear(4, 1).double()

    def closure() -> Any:
        dist = problem.policy(problem.observations)
        loss, kl = problem.values(dist)
        whole = loss + 0.5 * (critic(problem.observations) - 3).square().mean()
        return (whole, kl, dist) if third else (whole, kl)

    before = problem.vector()
    optimizer = TrustRegionOptimizer([*problem.parameters(), *critic.parameters()], mode=mode)
    with pytest.raises(
        TrustRegionError, match=r"5 \(shape \(1, 4\)\), 6 .*critic with its own opti"
    ):
        optimizer.step(closure)
    assert torch.equal(problem.vector(), before)


def test_vanilla_takes_a_parameter_that_the_kl_does_not_depend_on() -> None:
    problem = gaussian()
    value = nn.Parameter(torch.ones((), dtype=torch.float64))

    def closure() -> tuple[Tensor, Tensor]:
        loss, kl = problem.closure()
        return loss + 0.5 * (value - 3).square(), kl

    optimizer = TrustRegionOptimizer([*problem.parameters(), value], mode="vanilla", lr=0.1)
    assert optimizer.step(closure).accepted
    assert value.item() == pytest.approx(1.2)


def test_frozen_and_unused_parameters_stay_untouched() -> None:
    problem = gaussian()
    unused = nn.Parameter(torch.randn(3, dtype=torch.float64))
    assert isinstance(problem.policy, GaussianPolicy)
    problem.policy.log_std.requires_grad_(False)
    before = unused.clone(), problem.policy.log_std.clone()
    optimizer = TrustRegionOptimizer([*problem.parameters(), unused])
    assert optimizer.step(problem.closure).accepted
    assert torch.equal(unused, before[0])
    assert torch.equal(problem.policy.log_std, before[1])


@each_device
@pytest.mark.parametrize("mode", MODES)
def test_two_runs_take_the_same_steps_bit_for_bit(mode: str, device: str) -> None:
    def run() -> list[Tensor]:
        problem = categorical(dtype=torch.float32, device=device)
        optimizer = problem.optimizer(mode=mode, lr=0.3)
        points = []
        for _ in range(3):
            optimizer.step(problem.closure)
            problem = Problem(problem.policy, problem.observations)
            points.append(problem.vector())
        return points

    assert all(map(torch.equal, run(), run()))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_parameters_keep_their_dtype(dtype: torch.dtype) -> None:
    problem = gaussian(dtype=torch.float64)
    problem.policy.to(dtype)
    problem.observations = problem.observations.to(dtype)
    problem = Problem(problem.policy, problem.observations)
    # bfloat16 resolves no KL of 0.01: the loss and the KL are taken in float32
    if dtype == torch.bfloat16:
        problem.old = Independent(Normal(*_upcast(problem.old)), 1)
        problem.old_log_prob = problem.old.log_prob(problem.actions.float())
        problem.actions, problem.advantages = problem.actions.float(), problem.advantages.float()

    def closure() -> tuple[Tensor, Tensor]:
        dist = problem.policy(problem.observations)
        return problem.values(
            Independent(Normal(*_upcast(dist)), 1) if dtype == torch.bfloat16 else dist
        )

    assert problem.optimizer().step(closure).outcome is Outcome.ACCEPTED
    assert all(each.dtype == dtype for each in problem.parameters())


def _upcast(dist: Any) -> tuple[Tensor, Tensor]:
    return dist.base_dist.loc.float(), dist.base_dist.scale.float()
