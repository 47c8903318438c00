"""The state of real environments, taken and put back: what follows is the same, bit for bit."""

from __future__ import annotations

import functools
import pickle
import random
from collections import deque
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any, NamedTuple

import ale_py
import gymnasium as gym
import numpy as np
import pytest
import torch
from gymnasium import wrappers
from gymnasium.vector import SyncVectorEnv
from profiles import problems
from torch import nn

from trpo_optim import TrustRegionError
from trpo_optim.rollouts import (
    Replayed,
    Simulator,
    capture,
    register_simulator,
    restorable,
    restore,
)

gym.register_envs(ale_py)

Env = gym.Env[Any, Any]
box2d = pytest.mark.filterwarnings("ignore::DeprecationWarning")
"""What its bindings raise when they are imported."""

MUJOCO = ["Hopper-v5", "Humanoid-v5", "Ant-v5", "Reacher-v5", "Swimmer-v5"]
CLASSIC = ["CartPole-v1", "Pendulum-v1", "Acrobot-v1", "MountainCar-v0", "MountainCarContinuous-v0"]
TOY = ["FrozenLake-v1", "Taxi-v4", "CliffWalking-v1", "Blackjack-v1"]
ATARI = ["ALE/Pong-v5", "ALE/Breakout-v5"]
BOX2D = ["LunarLander-v3", "LunarLanderContinuous-v3", "BipedalWalker-v3"]
ADAPTERS = {
    "MuJoCo": MUJOCO,
    "classic control": CLASSIC,
    "toy text": TOY,
    "Atari": ATARI,
    "Box2D": BOX2D,
}


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


@pytest.mark.no_cover
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
    "env_id", ["Hopper-v5", "Acrobot-v1", "Taxi-v4", "ALE/Pong-v5", "BipedalWalker-v3"]
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


class Holding(gym.Wrapper[Any, Any, Any, Any]):
    """An environment with one more attribute."""

    def __init__(self, env: Env, held: Any) -> None:
        super().__init__(env)
        self.held = held


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


def test_only_what_hides_its_state_is_replayed() -> None:
    for env_id in ("CartPole-v1", "Hopper-v5"):
        assert not isinstance(restorable(functools.partial(gym.make, env_id)), Replayed)
    assert isinstance(restorable(functools.partial(gym.make, "ALE/Pong-v5")), Replayed)


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
        env = begun(other)
        before = pickle.dumps(capture(env))
        with pytest.raises(
            TrustRegionError, match=r"captured from .*Hopper-v5.*Make it in the same"
        ):
            restore(env, snapshot)
        assert pickle.dumps(capture(env)) == before
    bare = gym.make("Hopper-v5")
    with pytest.raises(TrustRegionError, match="wrappers included"):
        restore(bare, snapshot)


class Heavier(gym.Wrapper[Any, Any, Any, Any]):
    """Changes the model's gravity at every reset."""

    def reset(self, **options: Any) -> Any:
        result = self.env.reset(**options)
        inner: Any = self.unwrapped
        inner.model.opt.gravity[2] = -9.81 * inner.np_random.uniform(0.5, 2.0)
        return result


def test_a_mujoco_state_of_another_model_is_refused_and_nothing_changes() -> None:
    hoppers = SyncVectorEnv([lambda: gym.make("Hopper-v5")] * 2)
    hoppers.reset(seed=0)
    snapshot = capture(hoppers)
    hoppers.step(hoppers.action_space.sample())
    inner: Any = hoppers.envs[1].unwrapped
    inner.model.opt.gravity[2] = -5.0
    before = pickle.dumps(capture(hoppers))
    with pytest.raises(TrustRegionError, match=r"other parameters by now.*Replayed"):
        restore(hoppers, snapshot)
    assert pickle.dumps(capture(hoppers)) == before


def test_a_model_that_changes_at_every_reset_can_be_replayed() -> None:
    env = Replayed(lambda: Heavier(gym.make("Hopper-v5")))
    env.reset(seed=0)
    actions = [env.action_space.sample() for _ in range(10)]
    snapshot = capture(env)
    said = played(env, actions)
    env.reset()
    restore(env, snapshot)
    assert same(played(env, actions), said)


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


@pytest.mark.parametrize("hide", [lambda env: {"other": env}, lambda env: [0, env]])
def test_an_environment_out_of_reach_is_refused(hide: Callable[[Env], Any]) -> None:
    env = Holding(gym.make("CartPole-v1"), hide(gym.make("CartPole-v1")))
    env.reset()
    with pytest.raises(TrustRegionError, match=r"Holding.held\[.*an environment of its own"):
        capture(env)


def test_what_becomes_data_later_is_left_as_it_is() -> None:
    env = Holding(gym.make("CartPole-v1"), print)
    env.reset()
    snapshot = capture(env)
    env.held = 3
    restore(env, snapshot)
    assert env.held == 3


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
