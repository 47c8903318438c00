"""Vine: its objective, its branches, and the environments as it leaves them."""

from __future__ import annotations

import math
from functools import partial
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
import torch
from devices import each_device
from gymnasium.vector import SyncVectorEnv
from lakes import GAMMA, Swing, Table, gradient, lakes, pendulums
from torch import Tensor
from torch.distributions import Categorical

from trpo_optim import TrustRegionError, TrustRegionOptimizer
from trpo_optim.rollouts import (
    capture,
    restore,
    single_path,
    vine,
    vine_closure,
)


def test_trying_all_actions_is_equation_15() -> None:
    torch.manual_seed(0)
    policy = Table()
    batch = vine(lakes(4), policy, steps=20, states=30, horizon=20, gamma=GAMMA, seed=0)
    assert batch.sampling_log_prob is None
    assert batch.actions.tolist() == [[0, 1, 2, 3]] * 30
    old = gradient(policy, -(policy(batch.observations).probs * batch.q).sum(1).mean())
    closure = vine_closure(policy, batch)
    torch.testing.assert_close(gradient(policy, closure()[0]), old)
    with torch.no_grad():
        before = (policy(batch.observations).probs * batch.q).sum(1).mean()
        policy.logits.add_(torch.randn_like(policy.logits))
        after = (policy(batch.observations).probs * batch.q).sum(1).mean()
    torch.testing.assert_close(closure()[0].detach(), before - after)


@pytest.mark.parametrize("sampling", ["policy", "uniform"])
def test_trying_some_actions_is_equation_16(sampling: Any) -> None:
    torch.manual_seed(0)
    policy = Table()
    batch = vine(
        lakes(4),
        policy,
        steps=20,
        states=30,
        branches=3,
        sampling=sampling,
        horizon=20,
        gamma=GAMMA,
        seed=0,
    )
    assert batch.q.shape == batch.actions.shape == (30, 3)
    if sampling == "uniform":
        assert batch.sampling_log_prob is not None
        assert torch.equal(batch.sampling_log_prob, torch.full((30, 3), -math.log(4)))

    def objective() -> Tensor:
        logs = torch.log_softmax(policy.logits, 1)[batch.observations].gather(1, batch.actions)
        assert batch.sampling_log_prob is not None
        ratio = (logs - batch.sampling_log_prob).exp()
        return ((ratio * batch.q).sum(1) / ratio.sum(1)).mean()

    closure = vine_closure(policy, batch)
    torch.testing.assert_close(
        gradient(policy, closure()[0]), gradient(policy, -objective()), rtol=1e-3, atol=1e-7
    )
    with torch.no_grad():
        before = objective()
        policy.logits.add_(torch.randn_like(policy.logits))
        torch.testing.assert_close(closure()[0], before - objective(), rtol=1e-3, atol=1e-6)


@each_device
def test_the_step_is_held_over_the_whole_trunk(device: str) -> None:
    policy, envs = Swing().to(device), pendulums()
    batch = vine(
        envs,
        policy,
        steps=25,
        states=20,
        branches=4,
        horizon=10,
        gamma=0.97,
        critic=lambda seen: seen.sum(1),
        seed=0,
        device=device,
    )
    closure = vine_closure(policy, batch, entropy_bonus=0.01)
    loss, kl, _ = closure()  # type: ignore[misc]  # with a distribution
    assert kl.shape == (200,)
    report = TrustRegionOptimizer(policy.parameters(), constraint="max").step(closure)
    assert report.accepted
    assert report.engine == "Gauss-Newton"
    assert report.largest_kl <= 0.01
    assert report.loss_before == pytest.approx(float(loss.detach()), abs=1e-6)


def test_curvature_is_taken_on_a_share_of_the_trunk() -> None:
    policy, envs = Swing(), pendulums()
    batch = vine(envs, policy, steps=25, states=20, branches=4, horizon=10, gamma=0.97, seed=0)
    whole = vine_closure(policy, batch)
    built = vine_closure(policy, batch, curvature=0.1, generator=torch.Generator().manual_seed(3))
    assert whole.curvature is None
    assert built.curvature is not None
    rows = torch.randperm(200, generator=torch.Generator().manual_seed(3))[:20].sort().values
    with torch.no_grad():
        for parameter in policy.parameters():
            parameter.add_(0.1)
        kl = built()[1]
        assert kl.shape == (200,)
        torch.testing.assert_close(built.curvature()[1], kl[rows])
        for parameter in policy.parameters():
            parameter.sub_(0.1)
    assert TrustRegionOptimizer(policy.parameters()).step(built).accepted
    with pytest.raises(
        TrustRegionError, match=r"curvature is 0; it must be 'auto', a share in \(0, 1\)"
    ):
        vine_closure(policy, batch, curvature=0)


def test_the_environments_are_left_where_the_trunk_ended() -> None:
    policy, envs, others = Swing(), pendulums(), pendulums()
    torch.manual_seed(0)
    plain = single_path(others, policy, steps=15, seed=0)
    state = torch.get_rng_state()
    after_plain = single_path(others, policy, steps=15, after=plain)
    torch.manual_seed(0)
    batch = vine(
        envs,
        policy,
        steps=15,
        states=lambda step, cursor: np.arange(8) == step,
        branches=2,
        horizon=9,
        gamma=0.97,
        seed=0,
    )
    assert batch.q.shape == (8, 2)
    assert batch.steps == 15 * 8 + 8 * 2 * 9
    torch.testing.assert_close(batch.observations, batch.trunk.observations[range(8), range(8)])
    torch.set_rng_state(state)
    end = capture(envs)
    after_vine = single_path(envs, policy, steps=15, after=batch.trunk)
    assert torch.equal(batch.trunk.observations, plain.observations)
    assert torch.equal(after_vine.observations, after_plain.observations)
    assert torch.equal(after_vine.rewards, after_plain.rewards)
    restore(envs, end)
    torch.set_rng_state(state)
    again = vine(envs, policy, steps=15, states=9, branches=2, horizon=2, gamma=0.97, after=batch)
    assert torch.equal(again.trunk.observations[0], after_plain.observations[0])


def test_a_branch_stops_where_its_episode_does() -> None:
    """Every branch of CartPole returns how long the pole stood, counted from the state on."""
    torch.manual_seed(0)
    envs = SyncVectorEnv([lambda: gym.make("CartPole-v1")] * 4, autoreset_mode="NextStep")
    policy = lambda seen: Categorical(logits=torch.tensor([9.0, -9.0]).expand(len(seen), 2))  # noqa: E731
    batch = vine(envs, policy, steps=30, states=40, horizon=100, gamma=1.0, seed=0)
    assert batch.q.max() <= 12
    assert batch.q[:, 0].min() >= 1
    branch_steps = batch.steps - int(batch.trunk.valid.sum())
    assert branch_steps == int(batch.q.sum())


class Noisy(gym.Wrapper[Any, Any, Any, Any]):
    """Rewards with the environment's own random numbers, and ends after four steps."""

    def step(self, action: Any) -> Any:
        observation, _, *rest = self.env.step(action)
        return (observation, float(self.unwrapped.np_random.normal()), *rest)


@pytest.mark.parametrize("common", [True, False])
def test_branches_of_one_action_differ_by_their_random_numbers_alone(*, common: bool) -> None:
    torch.manual_seed(0)
    envs = SyncVectorEnv([lambda: Noisy(gym.make("CartPole-v1"))] * 4, autoreset_mode="SameStep")
    batch = vine(
        envs,
        lambda seen: Categorical(logits=torch.tensor([60.0, 0.0]).expand(len(seen), 2)),
        steps=5,
        states=10,
        branches=3,
        horizon=1,
        gamma=1.0,
        common_random_numbers=common,
        seed=0,
    )
    spread = batch.q.std(1)
    assert (spread == 0).all() if common else (spread > 0).all()
    assert len(batch.q[:, 0].unique()) == 10  # no two states have the same


def test_a_branch_that_is_cut_off_is_worth_what_the_critic_says_of_the_rest() -> None:
    envs = SyncVectorEnv([lambda: gym.make("Pendulum-v1", max_episode_steps=4)] * 2)
    batch = vine(
        envs,
        Swing(),
        steps=1,
        states=lambda step, cursor: np.array([True, True]),
        branches=2,
        horizon=9,
        gamma=0.5,
        critic=lambda seen: torch.full((len(seen),), 1000.0),
        seed=0,
    )
    rewards = batch.q - 0.5**4 * 1000.0
    assert (rewards <= 0).all()
    assert (rewards > -16.3 * 2).all()  # the reward's smallest, four times


def test_a_critic_has_no_say_where_an_episode_ended() -> None:
    torch.manual_seed(0)
    batch = vine(
        lakes(4),
        Table(),
        steps=20,
        states=20,
        horizon=200,
        gamma=GAMMA,
        critic=lambda states: torch.full((len(states),), math.inf),
        seed=0,
    )
    assert batch.q.isfinite().all()


def test_a_branch_is_run_in_the_environment_that_its_state_is_of() -> None:
    torch.manual_seed(0)
    make = partial(gym.make, "FrozenLake-v1", is_slippery=False)
    envs = SyncVectorEnv(
        [partial(make, desc=["SG", "HH"]), partial(make, desc=["SH", "GH"])],
        autoreset_mode="SameStep",
    )
    batch = vine(
        envs,
        Table(),
        steps=3,
        states=lambda step, cursor: np.array([step != 1, True]),
        horizon=1,
        gamma=1.0,
        seed=0,
    )
    right, down = [0.0, 0.0, 1.0, 0.0], [0.0, 1.0, 0.0, 0.0]  # where each has its goal
    assert sorted(batch.q.tolist()) == [right] * 2 + [down] * 3
    assert batch.q[:2].tolist() == [right, down]  # side by side


def test_branches_leave_torchs_random_state_alone() -> None:
    draws = []
    for horizon in (1, 5):
        torch.manual_seed(0)
        vine(
            pendulums(),
            Swing(),
            steps=2,
            states=3,
            branches=2,
            horizon=horizon,
            gamma=0.9,
            seed=0,
        )
        draws.append(torch.rand(1))
    assert torch.equal(*draws)


def test_an_entropy_bonus_counts_in_the_loss() -> None:
    torch.manual_seed(0)
    policy = Table()
    batch = vine(lakes(4), policy, steps=5, states=5, horizon=5, gamma=GAMMA, seed=0)
    plain, with_bonus = (
        float(vine_closure(policy, batch, entropy_bonus=bonus)()[0].detach())
        for bonus in (0.0, 2.0)
    )
    nats = float(policy(batch.observations).entropy().mean().detach())
    assert with_bonus == pytest.approx(plain - 2.0 * nats, abs=1e-5)


def test_a_batch_is_shown_in_one_line() -> None:
    batch = vine(lakes(4), Table(), steps=5, states=5, horizon=5, gamma=GAMMA, seed=0)
    assert repr(batch) == f"VineBatch(5 states, 4 actions of each, {batch.steps} steps)"
