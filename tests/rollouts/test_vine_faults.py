"""What is kept where an environment dies on a branch, and what vine refuses."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
import torch
from gymnasium.vector import SyncVectorEnv
from lakes import GAMMA, Swing, Table, lakes, pendulums
from torch.distributions import Categorical

from trpo_optim import TrustRegionError, TrustRegionOptimizer
from trpo_optim.rollouts import (
    RolloutError,
    VineBatch,
    single_path,
    vine,
    vine_closure,
)


class Dying(gym.Wrapper[Any, Any, Any, Any]):
    """An environment that is gone after so many steps, or rewards with NaN from then on."""

    def __init__(self, env: gym.Env[Any, Any], steps: list[int], odd: bool) -> None:
        super().__init__(env)
        self.steps, self.odd = steps, odd

    def step(self, action: Any) -> Any:
        left = next(COUNTER)
        observation, reward, *rest = self.env.step(action)
        if left > self.steps[0] and not self.odd:
            raise ConnectionError("gone")
        return (observation, math.nan if left > self.steps[0] else reward, *rest)


COUNTER = iter(range(10**9))


@pytest.mark.parametrize("odd", [False, True])
def test_states_that_were_finished_are_kept_when_an_environment_dies(*, odd: bool) -> None:
    global COUNTER
    COUNTER = iter(range(10**9))
    envs = SyncVectorEnv(
        [lambda: Dying(gym.make("Pendulum-v1"), [200], odd)] * 2, autoreset_mode="SameStep"
    )
    policy = Swing()
    with pytest.raises(RolloutError, match="A branch failed") as caught:
        vine(envs, policy, steps=20, states=40, branches=2, horizon=3, gamma=GAMMA, seed=0)
    batch = caught.value.batch
    assert isinstance(batch, VineBatch)
    assert 0 < len(batch.q) < 40
    assert len(batch.q) == len(batch.observations) == len(batch.actions)
    assert batch.trunk.rewards.shape == (20, 2)
    assert TrustRegionOptimizer(policy.parameters()).step(vine_closure(policy, batch)).accepted
    for env, seen in zip(envs.envs, batch.trunk.end.observations, strict=True):
        angle = env.unwrapped.state[0]  # type: ignore[attr-defined]  # the pendulum's
        assert math.cos(angle) == pytest.approx(seen[0], abs=1e-6)  # back where the trunk ended


def growing(
    make: Callable[[], Any] = lakes, policy: Any = None, **options: Any
) -> Callable[[], object]:
    chosen = {"steps": 2, "states": 2, "horizon": 2, "gamma": 0.9, "seed": 0, **options}
    return lambda: vine(make(), policy or Table(), **chosen)


def odd_q(value: float) -> Callable[[], object]:
    def call() -> object:
        batch = vine(lakes(2), Table(), steps=2, states=2, horizon=2, gamma=0.9, seed=0)
        batch.q[:] = value
        return vine_closure(Table(), batch)

    return call


REFUSED: dict[str, tuple[Callable[[], object], str]] = {
    "zero branches": (growing(branches=0), "branches is 0; it must be a whole number of at least"),
    "one branch": (growing(branches=1), "branches is 1; it must be at least 2"),
    "zero states": (growing(states=0), "states is 0"),
    "zero steps": (growing(steps=0), "steps is 0"),
    "no horizon": (growing(horizon=0), "horizon is 0"),
    "γ": (growing(gamma=1.5), r"gamma is 1.5; it must be in \[0, 1\]"),
    "another sampling": (growing(branches=2, sampling="greedy"), "sampling is 'greedy'"),
    "more states than rows": (growing(states=33), "states is 33, and the trunk has 32 rows"),
    "half a step": (growing(horizon=2.5), "horizon is 2.5; it must be a whole number"),
    "a rule that returns places": (
        growing(states=lambda step, cursor: np.array([0, 1])),
        r"rule returned array\(\[0, 1\]\); it must be an array of 16 bools",
    ),
    "alike without a number": (growing(sampling="uniform"), "Pass branches=K to draw"),
    "a policy of more actions": (
        lambda: vine_closure(
            lambda seen: Categorical(torch.ones(len(seen), 5)),
            vine(lakes(2), Table(), steps=2, states=2, horizon=2, gamma=0.9, seed=0),
        ),
        "do not sum to 1.*the 4 actions that were tried",
    ),
    "all of a continuum": (growing(pendulums, Swing()), "vine cannot enumerate its actions"),
    "alike in a continuum": (
        growing(pendulums, Swing(), branches=2, sampling="uniform"),
        "vine cannot enumerate its actions",
    ),
    "vector wrappers": (
        growing(lambda: gym.wrappers.vector.RecordEpisodeStatistics(lakes(2))),
        "got a RecordEpisodeStatistics.*SyncVectorEnv",
    ),
    "a rule that takes none": (
        growing(states=lambda step, cursor: np.zeros(16, dtype=bool)),
        "No state of the trunk was taken",
    ),
    "an environment without a state": (
        growing(
            lambda: SyncVectorEnv([lambda: gym.make("LunarLander-v3")] * 2),
            lambda seen: Categorical(torch.ones(2, 4)),
        ),
        "cannot be captured.*LunarLander",
    ),
    "NaN Q": (odd_q(math.nan), "Q holds NaN"),
    "a batch of another kind": (
        lambda: vine_closure(Table(), single_path(lakes(2), Table(), steps=2)),  # type: ignore[arg-type]  # the mistake
        "got a SinglePathBatch; it takes what vine",
    ),
    "actions that the policy rules out": (
        lambda: vine_closure(
            lambda seen: Categorical(logits=torch.tensor([0.0, -math.inf]).expand(len(seen), 2)),
            replace(
                vine(lakes(2), Table(), steps=2, states=2, horizon=2, gamma=0.9, branches=2),
                actions=torch.ones(2, 2, dtype=torch.long),
            ),
        ),
        "rules out all actions that were tried.*sampling='policy'",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_what_makes_no_sense_is_refused_by_name(name: str) -> None:
    call, message = REFUSED[name]
    with pytest.raises(TrustRegionError, match=message):
        call()
