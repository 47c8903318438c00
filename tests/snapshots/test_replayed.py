"""Environments that hide their state, replayed from their last reset."""

from __future__ import annotations

import functools
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
from captured import Env, played, same
from gymnasium import wrappers

from trpo_optim import TrustRegionError
from trpo_optim.rollouts import (
    Replayed,
    capture,
    restorable,
    restore,
)


def test_only_what_hides_its_state_is_replayed() -> None:
    for env_id in ("CartPole-v1", "Hopper-v5"):
        assert not isinstance(restorable(functools.partial(gym.make, env_id)), Replayed)
    assert isinstance(restorable(functools.partial(gym.make, "ALE/Pong-v5")), Replayed)


@pytest.mark.slow
def test_a_replayed_environment_is_the_environment() -> None:
    """Seeds, clocks and spaces are those of the one inside; the emulator repeats actions."""
    make = functools.partial(gym.make, "ALE/Pong-v5", obs_type="ram")
    env, plain = Replayed(make), make()
    env.action_space.seed(0)
    actions = [env.action_space.sample() for _ in range(200)]
    env.reset(seed=1)
    env.step(0)
    first, expected = env.reset(seed=5), plain.reset(seed=5)
    assert same(first, expected)
    assert same([env.step(each) for each in actions], [plain.step(each) for each in actions])
    assert env.action_space == plain.action_space
    env.reset()
    snapshot = capture(env)
    said = [env.step(each) for each in actions]
    restore(env, snapshot)
    assert same([env.step(each) for each in actions], said)


def test_a_replay_that_goes_astray_is_refused() -> None:
    """An environment that draws from a generator that no reset seeds."""

    def astray() -> Env:
        noise = np.random.default_rng()
        return wrappers.TransformObservation(
            gym.make("CartPole-v1"), lambda seen: seen + np.float32(noise.normal()), None
        )

    env = Replayed(astray)
    with pytest.raises(TrustRegionError, match="No episode has begun"):
        capture(env)
    env.reset(seed=0)
    env.step(0)
    snapshot = capture(env)
    env.step(1)
    with pytest.raises(TrustRegionError, match=r"CartPole.*did not return.*1 actions.*reset"):
        restore(env, snapshot)


def test_a_replayed_environment_of_another_kind_is_refused() -> None:
    make = functools.partial(gym.make, "CartPole-v1")
    env, other = Replayed(make), Replayed(functools.partial(gym.make, "Acrobot-v1"))
    env.reset()
    other.reset()
    with pytest.raises(TrustRegionError, match=r"Replayed\(CartPole-v1\).*Replayed\(Acrobot-v1"):
        restore(other, capture(env))


class Heavier(gym.Wrapper[Any, Any, Any, Any]):
    """Changes the model's gravity at every reset."""

    def reset(self, **options: Any) -> Any:
        result = self.env.reset(**options)
        inner: Any = self.unwrapped
        inner.model.opt.gravity[2] = -9.81 * inner.np_random.uniform(0.5, 2.0)
        return result


def test_a_model_that_changes_at_every_reset_can_be_replayed() -> None:
    env = Replayed(lambda: Heavier(gym.make("Hopper-v5")))
    env.reset(seed=0)
    actions = [env.action_space.sample() for _ in range(10)]
    snapshot = capture(env)
    said = played(env, actions)
    env.reset()
    restore(env, snapshot)
    assert same(played(env, actions), said)


def test_a_replay_keeps_its_options_and_sees_a_changed_generator() -> None:
    env = Replayed(functools.partial(gym.make, "CartPole-v1"))
    first, _ = env.reset(seed=0, options={"low": -0.2, "high": 0.2})
    assert np.abs(first).max() > 0.05
    snapshot = capture(env)
    env.reset()
    restore(env, snapshot)
    assert capture(env).layers[0].simulators["journal"][1] == {"low": -0.2, "high": 0.2}
    env.unwrapped.np_random = np.random.default_rng(7)
    with pytest.raises(TrustRegionError, match="changed by other means"):
        restore(env, capture(env))
