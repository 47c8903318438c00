"""Environments in the wrappers that people put around them, and what they say."""

from __future__ import annotations

import functools
from typing import Any

import ale_py
import gymnasium as gym
import numpy as np
import pytest
from gymnasium import wrappers

from trpo_optim.rollouts import (
    restorable,
)

gym.register_envs(ale_py)

Env = gym.Env[Any, Any]
box2d = pytest.mark.filterwarnings("ignore::DeprecationWarning")
"""What its bindings raise when they are imported."""


def make(env_id: str) -> Env:
    """An environment in the wrappers that people put around it, each with a clock of its own."""
    if env_id.startswith("ALE/"):
        game = gym.make(
            env_id, frameskip=1, repeat_action_probability=0.0, max_num_frames_per_episode=400
        )
        env: Env = wrappers.StickyAction(wrappers.AtariPreprocessing(game), 0.25)
        env = wrappers.FrameStackObservation(env, 4)
    else:
        env = restorable(functools.partial(gym.make, env_id, max_episode_steps=30))
        if isinstance(env.observation_space, gym.spaces.Box):
            env = wrappers.NormalizeObservation(env)
    return wrappers.NormalizeReward(wrappers.RecordEpisodeStatistics(env))


def played(env: Env, actions: list[Any]) -> list[Any]:
    """What the environment says to actions in turn; it is reset where an episode ends."""
    said: list[Any] = []
    for action in actions:
        result = env.step(action)
        said.append(result)
        if result[2] or result[3]:
            said.append(env.reset())
    return said


def same(left: Any, right: Any) -> bool:
    """Compare nested results bit for bit, but for the wall clock."""
    if isinstance(left, dict):
        clock = {"t", "elapsed"}
        return left.keys() == right.keys() and all(
            same(left[name], right[name]) for name in left.keys() - clock
        )
    if isinstance(left, tuple | list):
        return len(left) == len(right) and all(map(same, left, right))
    return np.asarray(left).tobytes() == np.asarray(right).tobytes()


def begun(env_id: str) -> Env:
    env = make(env_id)
    env.reset(seed=0)
    env.action_space.seed(1)
    return env


class Holding(gym.Wrapper[Any, Any, Any, Any]):
    """An environment with one more attribute."""

    def __init__(self, env: Env, held: Any) -> None:
        super().__init__(env)
        self.held = held
