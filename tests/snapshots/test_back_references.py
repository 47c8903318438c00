"""What refers back to its environment refers to the environment that is restored."""

from __future__ import annotations

import pickle
import weakref
from collections.abc import Callable
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
from captured import Env, Holding, played, same
from gymnasium.vector import SyncVectorEnv

from trpo_optim import TrustRegionError
from trpo_optim.rollouts import capture, restore


class Referee:
    """A helper that counts, and looks at the environment that it belongs to."""

    def __init__(self, home: Any) -> None:
        self.home, self.counted = home, [0]


class Refereed(gym.Wrapper[Any, Any, Any, Any]):
    """An environment with a helper that refers back to it, and rewards by what that sees."""

    def __init__(self, env: Env, refer: Callable[[Env], Any], find: Callable[[Any], Env]) -> None:
        super().__init__(env)
        self.referee, self.find = Referee(refer(self)), find

    def step(self, action: Any) -> Any:
        observation, _, *rest = self.env.step(action)
        self.referee.counted[0] += 1
        home: Any = self.find(self.referee.home)
        return (observation, float(home.unwrapped.state[0]) + self.referee.counted[0], *rest)


WAYS: dict[str, tuple[Callable[[Any], Any], Callable[[Any], Any]]] = {
    "the wrapper": (lambda env: env, lambda home: home),
    "the environment in it": (lambda env: env.unwrapped, lambda home: home),
    "in a dict": (lambda env: {"env": [env]}, lambda home: home["env"][0]),
    "in a tuple and a set": (lambda env: (0, {env}), lambda home: next(iter(home[1]))),
    "as a key": (lambda env: {env: 1}, lambda home: next(iter(home))),
    "in an array": (
        lambda env: np.array([env, None], dtype=object),
        lambda home: home[0],
    ),
    "by another helper": (lambda env: Referee(Referee(env)), lambda home: home.home.home),
    "by a method": (lambda env: [env.reset], lambda home: home[0].__self__),
    "by a weak reference": (weakref.ref, lambda home: home()),
    "by a proxy": (weakref.proxy, lambda home: home.env.unwrapped),
}


def refereed(way: str) -> Any:
    return Refereed(gym.make("CartPole-v1"), *WAYS[way])


@pytest.mark.parametrize("way", WAYS)
def test_a_restored_helper_looks_at_its_own_environment(way: str) -> None:
    env, other = refereed(way), refereed(way)
    env.reset(seed=0)
    other.reset(seed=1)
    played(env, [0, 1, 1])
    pickled = pickle.dumps(capture(env))
    actions = [0, 1, 0, 0, 1, 1, 0, 0, 0, 0, 0, 0, 0, 0, 0]
    said = played(env, actions)
    for each in (env, other):
        restore(each, pickle.loads(pickled))
        assert WAYS[way][1](each.referee.home).unwrapped is each.unwrapped
        assert same(played(each, actions), said)


def test_helpers_of_vector_environments_may_refer_to_all_of_them() -> None:
    envs, others = (SyncVectorEnv([lambda: refereed("the wrapper")] * 2) for _ in range(2))
    for each in (envs, others):
        each.reset(seed=0)
        each.referee = Referee(each)  # type: ignore[attr-defined]  # added here
    envs.step(np.array([0, 1]))
    snapshot = capture(envs)
    restore(others, snapshot)
    assert others.referee.home is others  # type: ignore[attr-defined]  # as above
    for inner in others.envs:
        assert inner.referee.home is inner
    actions = [np.array([1, 0])] * 5
    assert same([envs.step(each) for each in actions], [others.step(each) for each in actions])


@pytest.mark.parametrize(
    "hide",
    [
        lambda env: Referee(env),
        lambda env: np.array([env, None], dtype=object),
        weakref.ref,
    ],
)
def test_another_environment_is_out_of_reach_of_a_helper(hide: Callable[[Env], Any]) -> None:
    stranger = gym.make("CartPole-v1")
    env = Holding(gym.make("CartPole-v1"), hide(stranger))
    env.reset()
    with pytest.raises(
        TrustRegionError, match=r"Holding\.held.*(is another environment|is hidden)"
    ):
        capture(env)
