"""Environments may return arrays or tensors, infos as a dict or a list, policies any precision."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import gymnasium as gym
import pytest
import torch
from gymnasium.vector import AutoresetMode, VectorEnv, VectorWrapper
from gymnasium.wrappers.vector import DictInfoToList
from small_environments import cartpole, coin, each_mode, vector
from torch import Tensor, nn
from torch.distributions import Categorical, Distribution, Independent, Normal

from trpo_optim import TrustRegionError, TrustRegionOptimizer
from trpo_optim.rollouts import SinglePathBatch, fit_value, gae, policy_closure, single_path

VectorEnvs = VectorEnv[Any, Any, Any]


class Tensors(VectorWrapper):
    """Environments of tensors, as those on a GPU are."""

    def reset(self, **options: Any) -> Any:
        observations, info = self.env.reset(**options)
        return torch.from_numpy(observations), info

    def step(self, actions: Any) -> Any:
        assert isinstance(actions, Tensor)
        *numbers, info = self.env.step(actions.numpy())
        return (*map(torch.from_numpy, numbers), info)


def rolled_out(envs: VectorEnvs) -> list[SinglePathBatch]:
    torch.manual_seed(0)
    first = single_path(envs, coin, steps=40, seed=0)
    return [first, single_path(envs, coin, steps=30, after=first)]


def assert_alike(envs: VectorEnvs, plain: VectorEnvs) -> None:
    for found, expected in zip(rolled_out(envs), rolled_out(plain), strict=True):
        for name in ("observations", "actions", "rewards", "terminated", "truncated", "valid"):
            assert torch.equal(getattr(found, name), getattr(expected, name)), name
        assert torch.equal(found.cut_rows, expected.cut_rows)
        assert torch.equal(found.cut_observations, expected.cut_observations)
        assert found.episode_returns == expected.episode_returns


@each_mode
def test_environments_of_tensors_give_the_batch_of_arrays(mode: AutoresetMode) -> None:
    assert_alike(Tensors(vector(cartpole, mode=mode)), vector(cartpole, mode=mode))


def test_gymnasiums_environments_of_tensors_give_the_batch_of_arrays() -> None:
    wrappers = pytest.importorskip("gymnasium.wrappers.vector.numpy_to_torch")
    mode = AutoresetMode.NEXT_STEP
    envs = wrappers.NumpyToTorch(vector(cartpole, mode=mode))
    assert_alike(envs, vector(cartpole, mode=mode))


@each_mode
def test_infos_in_a_list_give_the_batch_of_those_in_a_dict(mode: AutoresetMode) -> None:
    assert_alike(DictInfoToList(vector(cartpole, mode=mode)), vector(cartpole, mode=mode))


class Column(VectorWrapper):
    """Rewards of shape (N, 1)."""

    def step(self, actions: Any) -> Any:
        observations, rewards, *rest = self.env.step(actions)
        return (observations, rewards[:, None], *rest)


def test_rewards_of_two_dimensions_are_refused() -> None:
    with pytest.raises(TrustRegionError, match=r"shape \(3, 1\); it must be \(3,\).*Reshape"):
        single_path(Column(vector(cartpole)), coin, steps=1)


class Half(nn.Module):
    """A policy whose numbers are all of half precision."""

    def __init__(self, kind: torch.dtype) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.kind = kind
        self.network = nn.Sequential(nn.Linear(3, 16), nn.Tanh(), nn.Linear(16, 1)).to(kind)

    def forward(self, seen: Tensor) -> Distribution:
        mean = self.network(seen.to(self.kind))
        return Independent(Normal(mean, torch.ones(1, dtype=self.kind)), 1)


@pytest.mark.parametrize("kind", [torch.bfloat16, torch.float16], ids=str)
def test_a_policy_and_a_critic_of_half_precision_are_served(kind: torch.dtype) -> None:
    policy, taken = Half(kind), list[Tensor]()

    def noted(action: Any) -> Any:
        taken.append(torch.from_numpy(action))
        return action

    def pendulum() -> Any:
        env = gym.make("Pendulum-v1")
        return gym.wrappers.TransformAction(env, noted, env.action_space)

    batch = single_path(vector(pendulum, 2), policy, steps=30, seed=0)
    assert batch.actions.dtype == kind
    assert torch.equal(torch.stack(taken).reshape(30, 2, 1), batch.actions.float().clamp(-2, 2))
    value = nn.Linear(3, 1).to(kind)
    critic: Callable[[Tensor], Tensor] = lambda seen: value(seen.to(kind))  # noqa: E731
    values, following = batch.values(critic)
    advantages = gae(batch.rewards, values, following, batch.ends, gamma=0.9, gae_lambda=0.9)
    optimizer = TrustRegionOptimizer(policy.parameters())
    assert optimizer.step(policy_closure(policy, batch, advantages, standardise=True)).accepted
    descent = torch.optim.SGD(value.parameters(), lr=1e-4)
    seen, aims = batch.flat((batch.observations, advantages + values))
    before = float((critic(seen).reshape(-1) - aims).square().mean().detach())
    assert fit_value(critic, seen, aims, descent, epochs=1).loss < before


@pytest.fixture
def half_precision() -> Any:
    torch.set_default_dtype(torch.bfloat16)
    yield
    torch.set_default_dtype(torch.float32)


@pytest.mark.usefixtures("half_precision")
def test_half_precision_may_be_the_default() -> None:
    policy = lambda seen: Categorical(logits=torch.zeros(len(seen), 2))  # noqa: E731
    whole = single_path(vector(cartpole), policy, steps=3, seed=0)
    assert whole.observations.dtype == torch.bfloat16
    assert len(whole.cut_observations) == 3
    episodes = single_path(vector(lambda: gym.make("FrozenLake-v1")), lakes_policy, episodes=3)
    assert len(episodes.cut_observations) == len(episodes.cut_rows)


def lakes_policy(states: Tensor) -> Categorical:
    return Categorical(logits=torch.zeros(len(states), 4))
