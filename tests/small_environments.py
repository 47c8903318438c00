"""Environments that a rollout is quickly told by."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import gymnasium as gym
import pytest
import torch
from gymnasium.vector import AutoresetMode, SyncVectorEnv
from torch import Tensor
from torch.distributions import Categorical

from trpo_optim.rollouts import SinglePathBatch, single_path

MODES = list(AutoresetMode)
each_mode = pytest.mark.parametrize("mode", MODES, ids=lambda mode: mode.name)

Env = gym.Env[Any, Any]


def vector(
    make: Callable[[], Env], count: int = 3, mode: AutoresetMode = AutoresetMode.SAME_STEP
) -> SyncVectorEnv:
    return SyncVectorEnv([make] * count, autoreset_mode=mode)


def cartpole() -> Env:
    return gym.make("CartPole-v1", max_episode_steps=15)


def coin(observations: Tensor) -> Categorical:
    """A policy that tosses a coin for every observation."""
    return Categorical(logits=torch.zeros(len(observations), 2))


def collected() -> SinglePathBatch:
    return single_path(vector(cartpole), coin, steps=2, seed=0)
