"""How learning runs are judged: whole episodes, from starts of the run's own."""

from __future__ import annotations

from functools import partial

import gymnasium as gym
import pytest
import torch
from evaluation import EPISODES, first_start, returns_at_random, returns_of
from gymnasium.vector import AutoresetMode, SyncVectorEnv
from torch import Tensor
from torch.distributions import Categorical


def make_envs(count: int) -> SyncVectorEnv:
    return SyncVectorEnv(
        [partial(gym.make, "CartPole-v1")] * count, autoreset_mode=AutoresetMode.SAME_STEP
    )


def leaning(observations: Tensor) -> Categorical:
    """Push, mostly, to where the pole leans."""
    lean = observations[:, 2] + observations[:, 3]
    return Categorical(logits=torch.stack([-4 * lean, 4 * lean], dim=1))


@pytest.mark.learns
def test_returns_are_those_of_whole_episodes_from_starts_of_the_runs_own() -> None:
    torch.manual_seed(0)
    returns = returns_of(make_envs(EPISODES), leaning, seed=2)
    assert [len(each) for each in returns.values()] == [EPISODES, EPISODES]
    assert sum(returns["deterministic"]) > 1.5 * sum(returns["sampled"])
    assert first_start(3) - first_start(2) >= EPISODES
    found = []
    for index in range(EPISODES):
        env = gym.make("CartPole-v1")
        observation, _ = env.reset(seed=first_start(2) + index)
        total, over = 0.0, False
        while not over:
            action = int(leaning(torch.as_tensor(observation)[None]).mode)
            observation, reward, terminated, truncated, _ = env.step(action)
            total, over = total + float(reward), terminated or truncated
        found.append(total)
    assert sorted(returns["deterministic"]) == sorted(found)


def test_fewer_environments_than_episodes_play_as_many() -> None:
    assert len(returns_at_random(make_envs(16), seed=0)) == EPISODES
