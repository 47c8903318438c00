"""The step of every mode against closed forms and dense float64 solves."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from devices import each_device
from problems import MODES, PROBLEMS, GaussianPolicy, Problem, categorical, gaussian
from torch import Tensor, nn
from torch.distributions import Categorical, Distribution, Independent, Normal

from trpo_optim import Outcome, TrustRegionOptimizer
from trpo_optim.hyperparameters import ModeName

EXACT = {"cg_iterations": 200, "cg_tolerance": 1e-13}

makers = pytest.mark.parametrize("make", PROBLEMS)


def taken(problem: Problem, **settings: Any) -> tuple[Tensor, Any]:
    """Take one step; return the move of the parameters and the report."""
    before = problem.vector()
    report = problem.optimizer(**settings).step(problem.closure)
    assert report.accepted, report
    return problem.vector() - before, report


def dense_direction(problem: Problem, damping: float) -> tuple[Tensor, Tensor]:
    """Return -(F + λI)⁻¹ g by a dense solve, and F."""
    fisher = problem.dense_fisher()
    damped = fisher + damping * torch.eye(len(fisher)).to(fisher)
    return -torch.linalg.solve(damped, problem.dense_gradient()), fisher


@each_device
@makers
@pytest.mark.parametrize("damping", [0.1, 1e-3])
def test_trpo_goes_along_the_dense_solution_by_the_undamped_length(
    make: Callable[..., Problem], damping: float, device: str
) -> None:
    problem = make(device=device)
    x, fisher = dense_direction(problem, damping)
    move, report = taken(problem, damping=damping, max_kl=1e-4, **EXACT)
    curvature = float(x @ fisher @ x)
    expected = math.sqrt(2 * 1e-4 / curvature) * x
    torch.testing.assert_close(move, report.step_scale * expected, rtol=1e-6, atol=1e-12)
    assert report.curvature == pytest.approx(curvature, rel=1e-6)


@makers
def test_natural_is_trpo_without_its_line_search(make: Callable[[], Problem]) -> None:
    problem = make()
    x, fisher = dense_direction(problem, 0.1)
    move, report = taken(problem, mode="natural", max_kl=0.5, damping=0.1, **EXACT)
    expected = math.sqrt(2 * 0.5 / float(x @ fisher @ x)) * x
    torch.testing.assert_close(move, expected, rtol=1e-6, atol=1e-12)
    assert report.step_scale == 1
    assert report.predicted_kl == pytest.approx(0.5)


@each_device
@makers
def test_natural_without_a_radius_takes_lr_times_the_direction(
    make: Callable[..., Problem], device: str
) -> None:
    problem = make(device=device)
    x, _ = dense_direction(problem, 0.1)
    move, _ = taken(problem, mode="natural", max_kl=None, lr=0.3, damping=0.1, **EXACT)
    torch.testing.assert_close(move, 0.3 * x, rtol=1e-6, atol=1e-12)


@each_device
@makers
def test_vanilla_takes_lr_times_the_gradient(make: Callable[..., Problem], device: str) -> None:
    problem = make(device=device)
    gradient = problem.dense_gradient()
    move, report = taken(problem, mode="vanilla", lr=0.3)
    torch.testing.assert_close(move, -0.3 * gradient, rtol=1e-10, atol=1e-14)
    assert report.fisher_products == 0
    assert math.isnan(report.curvature)


@makers
def test_vanilla_with_max_norm_fills_the_ball(make: Callable[[], Problem]) -> None:
    problem = make()
    gradient = problem.dense_gradient()
    move, report = taken(problem, mode="vanilla", max_norm=0.2)
    torch.testing.assert_close(move, -0.2 * gradient / gradient.norm(), rtol=1e-10, atol=1e-14)
    assert report.step_norm == pytest.approx(0.2)


def test_a_step_too_small_for_bfloat16_is_said_to_have_the_length_zero() -> None:
    policy = gaussian(dtype=torch.float32).policy.to(torch.bfloat16)
    with torch.no_grad():
        for parameter in policy.parameters():
            parameter.copy_(torch.ones_like(parameter))
    problem = Problem(policy, torch.randn(64, 4, dtype=torch.bfloat16))
    move, report = taken(problem, mode="vanilla", max_norm=1e-3)
    assert report.accepted
    assert report.step_norm == float(move.norm()) == 0


class Tabular(nn.Module):
    """Logits by state, of which few are seen."""

    def __init__(self, *, sparse: bool) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.table = nn.Embedding(50, 3, sparse=sparse)

    def forward(self, states: Tensor) -> Categorical:
        return Categorical(logits=self.table(states))


@pytest.mark.parametrize("mode", MODES)
def test_sparse_gradients_give_the_same_step(mode: str) -> None:
    steps = []
    for sparse in (False, True):
        policy = Tabular(sparse=sparse)
        steps.append(taken(Problem(policy, torch.arange(20)), mode=mode)[0])
    assert steps[0].norm() > 0
    torch.testing.assert_close(*steps)


@pytest.mark.parametrize("mode", MODES)
def test_lr_multiplies_the_step(mode: str) -> None:
    whole, _ = taken(gaussian(), mode=mode, max_kl=1e-4, improvement_ratio=0.0)
    half, _ = taken(gaussian(), mode=mode, max_kl=1e-4, lr=0.5)
    scale = 0.5
    if mode == "trpo":  # the line search may have shortened the whole step by a little
        scale = float(half.norm() / whole.norm())
        assert scale == pytest.approx(0.5, rel=0.1)
    torch.testing.assert_close(half, scale * whole, rtol=1e-10, atol=1e-14)


@pytest.mark.parametrize("mode", MODES)
def test_maximize_raises_what_minimizing_its_negative_lowers(mode: str) -> None:
    down, up = gaussian(), gaussian()

    def raised() -> tuple[Tensor, Tensor]:
        loss, kl = up.closure()
        return -loss, kl

    move, report = taken(down, mode=mode)
    before = up.vector()
    mirrored = up.optimizer(mode=mode, maximize=True).step(raised)
    assert torch.equal(up.vector() - before, move)
    assert mirrored.improvement == report.improvement > 0
    assert mirrored.loss_after - mirrored.loss_before == mirrored.improvement


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


@pytest.mark.parametrize("seed", range(25))
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


def test_a_parameter_in_the_loss_but_not_in_the_kl_is_no_error() -> None:
    problem = gaussian()
    value = nn.Parameter(torch.ones((), dtype=torch.float64))

    def closure() -> tuple[Tensor, Tensor]:
        loss, kl = problem.closure()
        return loss + 0.5 * (value - 3).square(), kl

    optimizer = TrustRegionOptimizer([*problem.parameters(), value])
    assert optimizer.step(closure).accepted
    assert value.item() > 1


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
