"""Environments learned from scratch, actions masked, bounded or squashed; within every radius."""

from __future__ import annotations

import math
from typing import Any

import agent
import gymnasium as gym
import numpy as np
import pytest
import torch
from gymnasium.envs.toy_text.taxi import TaxiEnv
from learner import (
    Learner,
    beta_kl,
    categorical_kl,
    learn_environment,
    squashed_normal_kl,
)
from torch import Tensor, nn
from torch.distributions import (
    Beta,
    Categorical,
    Distribution,
    Independent,
    Normal,
    TanhTransform,
    TransformedDistribution,
)
from torch.nn.functional import softplus

pytestmark = pytest.mark.learns

SEED = 0


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(SEED)


class Taxi(gym.ObservationWrapper[Any, Any, Any]):
    """Shows the state one-hot and the legal actions behind it; refuses illegal ones."""

    def __init__(self) -> None:
        super().__init__(gym.wrappers.TimeLimit(TaxiEnv(), 200))
        self.taxi: Any = self.unwrapped
        self.observation_space = gym.spaces.Box(0, 1, (506,), np.float32)

    def observation(self, observation: int) -> Any:
        shown = np.zeros(506, dtype=np.float32)
        shown[observation] = 1
        shown[500:] = self.taxi.action_mask(observation)
        return shown

    def step(self, action: Any) -> Any:
        assert self.taxi.action_mask(self.taxi.s)[action] == 1
        return super().step(action)


class TaxiPolicy(nn.Module):
    """A table of logits, of which only those of legal actions count."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Linear(500, 6)

    def forward(self, observations: Tensor) -> Distribution:
        state, legal = observations.split([500, 6], -1)
        return Categorical(logits=self.table(state).masked_fill(legal == 0, -math.inf))


def test_a_masked_policy_learns_to_drive_a_taxi_without_an_illegal_action() -> None:
    score = learn_environment(
        Taxi,
        Learner(TaxiPolicy(), categorical_kl, max_kl=0.05),
        nn.Sequential(nn.Linear(506, 1)),
        seed=SEED,
        gamma=0.95,
        critic_lr=0.05,
        updates=20,
    )
    assert score > 0  # legal actions at random: -186; the best mean: 8


class BetaPolicy(nn.Module):
    """Torque between 0 and 1."""

    def __init__(self) -> None:
        super().__init__()
        self.network = agent.mlp(3, 64, 2, gain=0.01)

    def forward(self, observations: Tensor) -> Distribution:
        return Independent(Beta(*(1 + softplus(self.network(observations))).split(1, -1)), 1)


class SquashedPolicy(nn.Module):
    """Torque between −1 and 1."""

    def __init__(self) -> None:
        super().__init__()
        self.network = agent.mlp(3, 64, 1, gain=0.01)
        self.log_std = nn.Parameter(torch.full((1,), -0.5))

    def forward(self, observations: Tensor) -> Distribution:
        mean = self.network(observations).clamp(-3, 3)  # so that no action rounds to ±1
        normal = Independent(Normal(mean, self.log_std.exp()), 1)
        return TransformedDistribution(normal, [TanhTransform(cache_size=1)])


def swing_up(learner: Learner, lowest: float, **amount: int) -> float:
    """Return the score on Pendulum-v1 with actions from there to 1."""

    def make() -> gym.Env[Any, Any]:
        env = gym.wrappers.RescaleObservation(
            gym.make("Pendulum-v1"), np.float32(-1), np.float32(1)
        )
        return gym.wrappers.RescaleAction(env, np.float32(lowest), np.float32(1))

    critic = agent.mlp(3, 64, 1, gain=1.0)
    return learn_environment(make, learner, critic, seed=SEED, gamma=0.9, critic_lr=3e-3, **amount)


def test_a_beta_policy_swings_a_pendulum_up() -> None:
    learner = Learner(BetaPolicy(), beta_kl)
    assert swing_up(learner, 0, updates=90, batch_size=1000) > -450  # at random: -1200


@pytest.mark.thorough
def test_a_squashed_gaussian_swings_a_pendulum_up() -> None:
    learner = Learner(SquashedPolicy(), squashed_normal_kl)
    assert swing_up(learner, -1, updates=35) > -450  # at random: -1200
