"""The state of environments, taken and put back: what follows is the same, bit for bit."""

from __future__ import annotations

import functools
import pickle
import random
from collections import deque
from datetime import timedelta
from pathlib import Path
from typing import Any, NamedTuple

import gymnasium as gym
import numpy as np
import pytest
import torch
from captured import Env, Holding, begun, box2d, make, played, same
from gymnasium.vector import SyncVectorEnv
from profiles import problems
from torch import nn

from trpo_optim import TrustRegionError
from trpo_optim.rollouts import (
    Simulator,
    capture,
    register_simulator,
    restore,
)

pytestmark = pytest.mark.no_cover

MUJOCO = ["Hopper-v5", "Humanoid-v5", "Ant-v5", "Reacher-v5", "Swimmer-v5"]
CLASSIC = ["CartPole-v1", "Pendulum-v1", "Acrobot-v1", "MountainCar-v0", "MountainCarContinuous-v0"]
TAXI = "Taxi-v4" if "Taxi-v4" in gym.registry else "Taxi-v3"  # the latter before Gymnasium 1.2

CLIFF = "CliffWalking-v1" if "CliffWalking-v1" in gym.registry else "CliffWalking-v0"

TOY = ["FrozenLake-v1", TAXI, CLIFF, "Blackjack-v1"]
ATARI = ["ALE/Pong-v5", "ALE/Breakout-v5"]
BOX2D = ["LunarLander-v3", "LunarLanderContinuous-v3", "BipedalWalker-v3"]
ADAPTERS = {
    "MuJoCo": MUJOCO,
    "classic control": CLASSIC,
    "toy text": TOY,
    "Atari": ATARI,
    "Box2D": BOX2D,
}


@pytest.mark.parametrize("adapter", ADAPTERS)
@box2d
def test_a_restored_state_replays_bit_for_bit(adapter: str) -> None:
    env_ids = ADAPTERS[adapter]
    lengths = random.Random(0)
    pairs = problems() // len(env_ids) + 1
    for env_id in env_ids:
        env = begun(env_id)
        states: deque[tuple[Any, list[Any], list[Any]]] = deque(maxlen=5)
        for _ in range(pairs):
            actions = [env.action_space.sample() for _ in range(lengths.randint(1, 10))]
            snapshot = capture(env)
            said = played(env, actions)
            states.append((snapshot, actions, said))
            old, again, expected = states[0]  # a few states back
            there = capture(env)
            restore(env, old)
            assert same(played(env, again), expected)
            restore(env, there)
        env.close()


@pytest.mark.parametrize(
    "env_id", ["Hopper-v5", "Acrobot-v1", TAXI, "ALE/Pong-v5", "BipedalWalker-v3"]
)
@box2d
def test_another_environment_made_alike_goes_on_from_a_pickled_state(env_id: str) -> None:
    env, other = begun(env_id), make(env_id)
    played(env, [env.action_space.sample() for _ in range(20)])
    pickled = pickle.dumps(capture(env))
    actions = [env.action_space.sample() for _ in range(40)]
    expected = played(env, actions)
    other.reset(seed=99)
    for _ in range(2):
        restore(other, pickle.loads(pickled))
        assert same(played(other, actions), expected)


def test_vector_environments_are_captured_whole() -> None:
    envs = SyncVectorEnv([functools.partial(make, "Hopper-v5")] * 3)
    envs.reset(seed=3)
    envs.action_space.seed(4)
    for _ in range(10):
        envs.step(envs.action_space.sample())
    snapshot = capture(envs)
    actions = [envs.action_space.sample() for _ in range(50)]
    first = [envs.step(each) for each in actions]
    restore(envs, snapshot)
    assert same([envs.step(each) for each in actions], first)


def test_a_snapshot_shares_no_memory_with_the_environment() -> None:
    env = begun("Hopper-v5")
    snapshot = capture(env)
    before = pickle.dumps(snapshot)
    played(env, [env.action_space.sample() for _ in range(50)])
    restore(env, snapshot)
    played(env, [env.action_space.sample() for _ in range(50)])
    assert pickle.dumps(snapshot) == before


class Point(NamedTuple):
    """A tuple with names."""

    x: int
    y: list[int]


class Plain:
    """An object whose state is in its attributes, one of them itself."""

    def __init__(self) -> None:
        self.numbers = [1, 2]
        self.me = self


def test_what_is_one_object_stays_one_and_what_was_not_there_goes_away() -> None:
    shared, agent, network = [1, 2, 3], Plain(), nn.Linear(1, 1)
    everything: dict[str, Any] = {
        "shared": (shared, shared),
        "plain": Plain(),
        "random": random.Random(3),
        "legacy": np.random.RandomState(4),
        "tensor": torch.arange(3.0, requires_grad=True),
        "set": {1, 2},
        "objects": np.array([[1], None], dtype=object),
        "agents": [agent],
        "places": {agent: [0]},
        "point": Point(1, [2]),
        "unchanging": [Path(), range(3), np.dtype(float), torch.device("cpu"), timedelta(1)],
        "network": network,
    }
    env: Any = Holding(gym.make("CartPole-v1"), everything)
    env.reset(seed=0)
    snapshot = capture(env)
    state = everything["legacy"].get_state()[1].copy()
    shared.append(4)
    env.held["plain"].numbers.append(3)
    env.held["random"].random()
    env.held["legacy"].random()
    env.held["later"] = 1
    env.later = 2
    restore(env, snapshot)
    held = env.held
    assert not hasattr(env, "later")
    assert held.keys() == everything.keys() - {"later"}
    assert held["places"] == {held["agents"][0]: [0]}
    assert held["point"] == Point(1, [2])
    assert held["unchanging"] == everything["unchanging"]
    assert held["network"] is network
    assert held["shared"][0] == [1, 2, 3]
    assert held["shared"][0] is held["shared"][1]
    assert held["plain"].numbers == [1, 2]
    assert held["plain"].me is held["plain"]
    assert held["random"].random() == random.Random(3).random()
    assert np.array_equal(held["legacy"].get_state()[1], state)


def test_a_simulator_can_be_made_known() -> None:
    env = Holding(gym.make("CartPole-v1"), iter([*range(100)]))
    env.reset()
    with pytest.raises(TrustRegionError, match=r"Holding.held is a builtins.list_iterator.*regist"):
        capture(env)
    simulator = Simulator(lambda it: it.__reduce__()[-1], lambda it, state: it.__setstate__(state))
    register_simulator("builtins.list_iterator", simulator)
    snapshot = capture(env)
    drawn = [next(env.held) for _ in range(3)]
    restore(env, snapshot)
    assert [next(env.held) for _ in range(3)] == drawn == [0, 1, 2]


class Views(Holding):
    """Keeps views: of its own memory, and of the simulator's."""

    def __init__(self, env: Env) -> None:
        super().__init__(env, np.zeros((3, 2), order="F").T)
        self.part = self.held[1, 1:]
        self.positions = self.unwrapped.data.qpos  # type: ignore[attr-defined]  # MuJoCo's


def test_views_stay_views_of_the_same_memory() -> None:
    env, other = Views(gym.make("Hopper-v5")), Views(gym.make("Hopper-v5"))
    env.reset(seed=0)
    other.reset(seed=1)
    env.held[:] = np.arange(6.0).reshape(2, 3)
    snapshot = pickle.loads(pickle.dumps(capture(env)))
    for each in (env, other):
        restore(each, snapshot)
        assert each.part.tolist() == [4.0, 5.0]
        each.held[1, 2] = 7.0
        assert each.part.tolist() == [4.0, 7.0]
        each.step(each.action_space.sample())
        assert np.array_equal(each.positions, each.unwrapped.data.qpos)  # type: ignore[attr-defined]  # MuJoCo's


def test_what_becomes_data_later_goes_back_to_what_it_was() -> None:
    env = Holding(gym.make("CartPole-v1"), print)
    env.reset()
    snapshot = capture(env)
    env.held = 3
    restore(env, snapshot)
    assert env.held is print
