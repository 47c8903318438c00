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


@pytest.mark.parametrize("count", [EPISODES, 16])
def test_every_kind_has_its_number_of_episodes(count: int) -> None:
    torch.manual_seed(0)
    returns = returns_of(make_envs(count), leaning, seed=0)
    assert [len(each) for each in returns.values()] == [EPISODES, EPISODES]
    assert sum(returns["deterministic"]) > 1.5 * sum(returns["sampled"])
    assert len(returns_at_random(make_envs(count), seed=0)) == EPISODES


def test_likeliest_actions_always_come_to_the_same_and_other_seeds_start_elsewhere() -> None:
    first, again, other = (
        returns_of(make_envs(EPISODES), leaning, seed)["deterministic"] for seed in (0, 0, 1)
    )
    assert first == again
    assert first != other


def test_starts_are_those_of_plain_environments_with_the_runs_seeds() -> None:
    returns = returns_of(make_envs(EPISODES), leaning, seed=2)["deterministic"]
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
    assert sorted(returns) == sorted(found)
