"""Attributes that are functions, methods, spaces or views of memory go back, too."""

from __future__ import annotations

import copy
import functools
import io
import logging
import math
import operator
import pickle
import re
import threading
from collections import deque
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
import torch

from trpo_optim import TrustRegionError
from trpo_optim.snapshots import Replayed, capture, restorable, restore


class Env(gym.Env[Any, Any]):
    """An environment whose rewards tell its state.

    Args:
        begin: Sets the state.
        act: Changes it and returns the reward.
    """

    observation_space = gym.spaces.Box(-np.inf, np.inf, (1,))
    action_space: Any = gym.spaces.Discrete(2)

    def __init__(self, begin: Callable[[Any], object], act: Callable[[Any], float]) -> None:
        self.own: Any = None
        self.beginning, self.acting = [begin], [act]  # in lists, so that they are not methods

    def reset(self, *, seed: int | None = None, options: Any = None) -> Any:
        super().reset(seed=seed, options=options)
        self.beginning[0](self)
        return np.zeros(1), {}

    def step(self, action: Any) -> Any:
        return np.zeros(1), self.acting[0](self), False, False, {}

    def one(self) -> float:
        self.own = self.two
        return 1.0

    def two(self) -> float:
        self.own = self.one
        return 2.0


def rock() -> float:
    return 1.0


def paper() -> float:
    return 2.0


def to(value: Callable[[Any], Any]) -> Callable[[Any], object]:
    """Return what sets the state to a new value."""
    return lambda env: setattr(env, "own", value(env))


def larger_space(env: Any) -> float:
    env.own = gym.spaces.Discrete(int(env.own.n) + 1)
    return float(env.own.n)


def counted(env: Any) -> float:
    env.own[1] += 1
    return float(env.own[1])


def popped(env: Any) -> float:
    return float(env.own.pop()()) if env.own else 0.0


def added(env: Any) -> float:
    whole, part = env.own
    whole += 1
    return float(part.sum())


def chosen(env: Any) -> float:
    value = env.own()
    env.own = paper if env.own is rock else rock
    return float(value)


def whole_and_part(env: Any) -> Any:
    whole = torch.zeros(4)
    return whole, whole[:2]


def namespace(env: Any) -> float:
    env.own.count += 1
    return float(env.own.count)


def second_moved(env: Any) -> float:
    env.own[1].append(0)
    return float(len(env.own[1]))


def drawn(env: Any) -> float:
    return float(env.own[1].random())


CASES: dict[str, tuple[Callable[[Any], Any], Callable[[Any], float]]] = {
    "a method": (lambda env: env.one, lambda env: float(env.own())),
    "a function": (lambda env: rock, chosen),
    "a list that begins with a function": (lambda env: [rock, 0], counted),
    "a list of functions": (lambda env: [rock, paper], popped),
    "a function and a list": (lambda env: (rock, [0]), second_moved),
    "a function and a queue": (lambda env: [rock, deque([0])], second_moved),
    "a space and a generator": (
        lambda env: (gym.spaces.Discrete(2), np.random.default_rng(0)),
        drawn,
    ),
    "a space": (lambda env: gym.spaces.Discrete(2), larger_space),
    "a tensor and a view of it": (whole_and_part, added),
    "a namespace": (lambda env: SimpleNamespace(count=0), namespace),
}


@pytest.mark.parametrize("name", CASES)
def test_an_environment_goes_on_as_it_did(name: str) -> None:
    value, act = CASES[name]
    env = Env(to(value), act)
    env.reset(seed=0)
    snapshot = capture(env)
    first = [env.step(0)[1] for _ in range(3)]
    for _ in range(2):
        restore(env, snapshot)
        assert [env.step(0)[1] for _ in range(3)] == first


def test_tensors_share_memory_again_in_another_environment_and_after_pickling() -> None:
    env, other = (Env(to(whole_and_part), added) for _ in range(2))
    env.reset(seed=0)
    env.own[0].requires_grad_()
    env.own[0].data += 3
    snapshot = pickle.loads(pickle.dumps(capture(env)))
    other.reset(seed=1)
    restore(other, snapshot)
    whole, part = other.own
    assert whole.requires_grad
    assert torch.equal(whole, torch.full((4,), 3.0))
    whole.data += 1
    assert torch.equal(part, torch.full((2,), 4.0))
    assert torch.equal(env.own[0], torch.full((4,), 3.0))  # shares nothing with the other


def test_an_environment_in_a_mixed_list_is_refused() -> None:
    env = Env(to(lambda env: [gym.make("CartPole-v1"), 0]), lambda env: 0.0)
    env.reset()
    with pytest.raises(TrustRegionError, match=r"own\[0\] is another environment"):
        capture(env)


class Viewing(gym.Wrapper[Any, Any, Any, Any]):
    """Keeps a view of the simulator's memory."""

    def __init__(self, env: Any, look: Callable[[Any], Any]) -> None:
        super().__init__(env)
        self.view = look(env.unwrapped.data)


def test_slices_of_mujocos_memory_stay_views() -> None:
    env = Viewing(gym.make("Hopper-v5"), lambda data: data.qpos[:2])
    env.reset(seed=0)
    snapshot = capture(env)
    env.step(env.action_space.sample())
    restore(env, snapshot)
    env.step(env.action_space.sample())
    simulator: Any = env.unwrapped
    assert np.array_equal(env.view, simulator.data.qpos[:2])


def test_a_view_of_mujocos_memory_inside_of_something_is_refused() -> None:
    env = Viewing(gym.make("Hopper-v5"), lambda data: {"q": data.qpos})
    env.reset(seed=0)
    with pytest.raises(TrustRegionError, match="is a view of the simulator's memory"):
        capture(env)


class Missing(gym.Wrapper[Any, Any, Any, Any]):
    """Its observations hold NaN."""

    def reset(self, **options: Any) -> Any:
        seen, info = self.env.reset(**options)
        return np.append(seen, np.nan).astype(np.float32), info

    def step(self, action: Any) -> Any:
        seen, *others = self.env.step(action)
        return np.append(seen, np.nan).astype(np.float32), *others


def test_a_replay_whose_observations_hold_nan_returns_to_its_state() -> None:
    env = Replayed(lambda: Missing(gym.make("CartPole-v1")))
    env.reset(seed=0)
    env.step(1)
    snapshot = capture(env)
    first = env.step(0)[0]
    restore(env, snapshot)
    assert np.array_equal(env.step(0)[0], first, equal_nan=True)


def test_a_namespace_needs_no_replay() -> None:
    def make() -> Any:
        return Env(to(lambda env: SimpleNamespace(seen=[1])), lambda env: 0.0)

    env: Any = restorable(make)
    assert not isinstance(env, Replayed)
    before = copy.deepcopy(env.own)
    snapshot = capture(env)
    env.own.seen.append(2)
    restore(env, snapshot)
    assert env.own == before


HELD: dict[str, Callable[[], Any]] = {
    "a conjugate": lambda: torch.tensor([1 + 2j]).conj(),
    "an imaginary part of one": lambda: torch.tensor([1 + 2j]).conj().imag,
    "a quantized tensor": lambda: torch.quantize_per_tensor(torch.ones(3), 0.1, 0, torch.quint8),
    "arrays of two sizes at one place": lambda: (
        lambda array: (torch.from_numpy(array[:3]), torch.from_numpy(array))
    )(np.arange(6.0)),
    "what is no leaf": lambda: torch.ones(2, requires_grad=True) * 2,
    "a copied row": lambda: np.ones(3, dtype=[("a", "f4")])[1].copy(),
    "a network and its optimizer": lambda: (
        lambda network: [network, torch.optim.SGD(network.parameters(), lr=0.1)]
    )(torch.nn.Linear(2, 2)),
    "a function and a lock": lambda: [rock, threading.Lock()],
    "functions of every kind": lambda: [
        *(rock, math.sin, np.sin, operator.itemgetter(0), functools.cache(rock)),
        *(functools.partial(rock), functools.partial),
    ],
    "a space and a pattern": lambda: (gym.spaces.Discrete(2), re.compile("a")),
    "a logger and its handler": lambda: (logging.getLogger("a"), logging.NullHandler()),
    "a function and a file": lambda: (rock, io.StringIO()),
}


@pytest.mark.parametrize("name", HELD)
@pytest.mark.filterwarnings("ignore:.*quantization is deprecated", "ignore:.*quantize_per_tensor")
def test_it_comes_back_as_it_was(name: str) -> None:
    env = Env(to(lambda env: HELD[name]()), lambda env: 0.0)
    env.reset()
    before = repr(env.own)
    with torch.device("meta"):  # where tensors are made does not matter
        snapshot = capture(env)
        restore(env, snapshot)
    assert repr(env.own) == before.replace(", grad_fn=<MulBackward0>", "")
    if name == "what is no leaf":
        env.own += 1  # in place, as an environment does
    if name == "a network and its optimizer":
        network, optimizer = env.own
        assert optimizer.param_groups[0]["params"][0] is network.weight


def test_a_row_of_a_large_tensor_is_kept_alone() -> None:
    env = Env(to(lambda env: torch.zeros(10_000_000)[3:5]), lambda env: 0.0)
    env.reset()
    snapshot = capture(env)
    assert len(pickle.dumps(snapshot)) < 100_000
    env.own += 1
    restore(env, snapshot)
    assert torch.equal(env.own, torch.zeros(2))
