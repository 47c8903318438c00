"""Environments that cannot be captured, and states of others, are refused by name."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
from captured import Env, Holding, begun, box2d, played, same
from gymnasium.vector import SyncVectorEnv

from trpo_optim import TrustRegionError
from trpo_optim.rollouts import (
    capture,
    restore,
)

REFUSED: dict[str, tuple[Callable[[], Any], str]] = {
    "Box2D": (lambda: gym.make("LunarLander-v3"), r"LunarLander.world.*SwigPyObject.*restorable"),
    "sticky emulator": (
        lambda: gym.make("ALE/Pong-v5"),
        r"repeat_action_probability=0.*StickyAction",
    ),
    "processes": (
        lambda: gym.make_vec("CartPole-v1", 2, vectorization_mode="async"),
        "AsyncVectorEnv keeps its environments in other processes.*SyncVectorEnv",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
@box2d
def test_an_environment_that_cannot_be_captured_is_refused_by_name(name: str) -> None:
    build, message = REFUSED[name]
    env = build()
    env.reset()
    with pytest.raises(TrustRegionError, match=message):
        capture(env)
    env.close()


def test_a_state_of_another_environment_is_refused_and_nothing_changes() -> None:
    snapshot = capture(begun("Hopper-v5"))
    for other in ("Swimmer-v5", "CartPole-v1"):
        env, twin = begun(other), begun(other)
        with pytest.raises(
            TrustRegionError, match=r"captured from .*Hopper-v5.*Make it in the same"
        ):
            restore(env, snapshot)
        actions = [env.action_space.sample() for _ in range(10)]
        assert same(played(env, actions), played(twin, actions))
    bare = gym.make("Hopper-v5")
    with pytest.raises(TrustRegionError, match="with the same wrappers"):
        restore(bare, snapshot)


def hoppers_on_another_planet() -> tuple[SyncVectorEnv, Any]:
    """Return environments whose gravity has changed since their state, beside it, was captured."""
    hoppers = SyncVectorEnv([lambda: gym.make("Hopper-v5")] * 2)
    hoppers.reset(seed=0)
    snapshot = capture(hoppers)
    hoppers.step(np.full((2, 3), 0.1, dtype=np.float32))
    inner: Any = hoppers.envs[1].unwrapped
    inner.model.opt.gravity[2] = -5.0
    return hoppers, snapshot


def test_a_mujoco_state_of_another_model_is_refused_and_nothing_changes() -> None:
    hoppers, snapshot = hoppers_on_another_planet()
    twins, _ = hoppers_on_another_planet()
    with pytest.raises(TrustRegionError, match=r"its parameters have changed.*Replayed"):
        restore(hoppers, snapshot)
    for _ in range(10):
        actions = hoppers.action_space.sample()
        assert same(hoppers.step(actions), twins.step(actions))


@pytest.mark.parametrize("hide", [lambda env: {"other": env}, lambda env: [0, env]])
def test_an_environment_out_of_reach_is_refused(hide: Callable[[Env], Any]) -> None:
    env = Holding(gym.make("CartPole-v1"), hide(gym.make("CartPole-v1")))
    env.reset()
    with pytest.raises(TrustRegionError, match=r"Holding.held\[.*is another environment"):
        capture(env)
