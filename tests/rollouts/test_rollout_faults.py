"""What is kept where an environment fails, and what a rollout refuses."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import gymnasium as gym
import pytest
import torch
from gymnasium import wrappers
from gymnasium.vector import AutoresetMode, SyncVectorEnv
from small_environments import Env, cartpole, coin, collected, each_mode, vector
from torch import Tensor
from torch.distributions import Categorical, Distribution, Independent, Normal

from trpo_optim import TrustRegionError
from trpo_optim.rollouts import RolloutError, single_path


class Unresettable(gym.Wrapper[Any, Any, Any, Any]):
    """An environment that begins once."""

    begun = False

    def reset(self, **options: Any) -> Any:
        if self.begun:
            raise ConnectionError("no further episode")
        self.begun = True
        return self.env.reset(**options)


def test_where_a_reset_fails_what_followed_the_last_row_is_still_known() -> None:
    """The first environment's episode ends after 5 steps; no pole falls as soon as that."""
    makes = [lambda: Unresettable(gym.make("CartPole-v1", max_episode_steps=5)), cartpole]
    envs = SyncVectorEnv(makes, autoreset_mode=AutoresetMode.DISABLED)
    with pytest.raises(RolloutError, match="no further episode") as it:
        single_path(envs, coin, steps=100, seed=0)
    batch = it.value.batch
    assert batch.cut_rows.tolist() == [[4, 0], [4, 1]]
    assert not torch.equal(batch.cut_observations[1], batch.observations[-1, 1])


class Failing(gym.Wrapper[Any, Any, Any, Any]):
    """An environment that dies, or loses count, after so many steps."""

    def __init__(self, env: Env, steps: int, reward: float | None = None) -> None:
        super().__init__(env)
        self.left, self.odd = steps, reward

    def step(self, action: Any) -> Any:
        self.left -= 1
        if self.left < 0 and self.odd is None:
            raise ConnectionError("the simulator is gone")
        observation, reward, *rest = self.env.step(action)
        return (observation, self.odd if self.left < 0 else reward, *rest)


@each_mode
def test_what_came_before_an_environment_died_is_kept(mode: AutoresetMode) -> None:
    envs = vector(lambda: Failing(cartpole(), 20), 2, mode)
    with pytest.raises(
        RolloutError, match=r"Step \d+ .*ConnectionError: the simulator is gone"
    ) as it:
        single_path(envs, coin, steps=100, seed=0)
    batch = it.value.batch
    assert 38 <= int(batch.valid.sum()) <= 42
    assert isinstance(it.value.__cause__, ConnectionError)
    values, following = batch.values(lambda seen: seen[:, 0])
    assert values.shape == following.shape == batch.rewards.shape
    with pytest.raises(RolloutError) as at_once:
        single_path(vector(lambda: Failing(cartpole(), 0), 2), coin, steps=100, seed=0)
    assert at_once.value.batch is None


@pytest.mark.parametrize("reward", [float("nan"), float("inf")])
def test_a_reward_that_is_no_number_is_told_with_its_place(reward: float) -> None:
    envs = vector(lambda: Failing(cartpole(), 20, reward), 2)
    with pytest.raises(RolloutError, match=rf"Environment 0 .* reward {reward} at step 20") as it:
        single_path(envs, coin, steps=30, seed=0)
    assert len(it.value.batch.rewards) == 30


def start(**options: Any) -> Callable[[], object]:
    return lambda: single_path(vector(cartpole), coin, **options)


def start_recurrent(policy: Callable[..., Any]) -> Callable[[], object]:
    return lambda: single_path(vector(cartpole), policy, steps=1, state=torch.zeros(1, 3, 4))


GOALS = gym.spaces.Discrete(4)


def with_parts(space: gym.Space[Any]) -> SyncVectorEnv:
    """Return as many environments as an action has parts."""
    return vector(lambda: wrappers.TransformAction(cartpole(), lambda _: 0, space), 2)


def pairs(seen: Tensor) -> Distribution:
    return Independent(Categorical(logits=torch.zeros(len(seen), 2, 4)), 1)


def in_time(seen: Tensor) -> Categorical:
    """A coin of batch shape (T, N)."""
    return Categorical(logits=torch.zeros(*seen.shape[:2], 2))


def with_sequences() -> SyncVectorEnv:
    space = gym.spaces.Sequence(gym.spaces.Discrete(3))
    return vector(lambda: wrappers.TransformObservation(cartpole(), lambda seen: (1, 2), space))


REFUSED: dict[str, tuple[Callable[[], object], str]] = {
    "neither steps nor episodes": (start(), "either steps or episodes"),
    "both": (start(steps=1, episodes=1), "either steps or episodes"),
    "no steps": (start(steps=0), "steps is 0; it must be a whole number of at least 1"),
    "no episodes": (start(episodes=-1), "episodes is -1"),
    "after and a seed": (
        lambda: start(steps=1, after=collected(), seed=1)(),
        "Pass either after or these",
    ),
    "after and episodes": (
        lambda: start(episodes=1, after=collected())(),
        "Pass either after or these",
    ),
    "one environment": (
        lambda: single_path(cartpole(), coin, steps=1),  # type: ignore[arg-type]  # the mistake
        "got a TimeLimit; it takes vector environments",
    ),
    "a state without its environments": (
        start(steps=1, state=(torch.zeros(1, 3, 4), torch.zeros(3, 4))),
        r"state holds a tensor of shape \(3, 4\); its second dimension must be the \d environments",
    ),
    "another number of environments": (
        lambda: single_path(vector(cartpole, 2), coin, steps=1, after=collected()),
        "after is a rollout of 3 environments, and envs has 2",
    ),
    "a space without a shape": (
        lambda: single_path(with_sequences(), coin, steps=1),
        "observations hold a Sequence.*Flatten or encode",
    ),
    "actions of another shape": (
        lambda: single_path(
            vector(lambda: gym.make("Pendulum-v1")),
            lambda seen: Independent(Normal(torch.zeros(len(seen), 2), torch.ones(2)), 1),
            steps=1,
        ),
        r"actions have shape \(3, 2\)",
    ),
    "a value beside the distribution": (
        lambda: single_path(vector(cartpole), lambda seen: (coin(seen), seen[:, 0]), steps=1),
        r"returned \(Categorical, Tensor\), and Discrete\(2\) takes one distribution",
    ),
    "nothing beside the distribution": (
        lambda: single_path(vector(cartpole), lambda seen: (coin(seen), None), steps=1),
        r"returned \(\w+, NoneType\)",
    ),
    "actions in NumPy": (
        lambda: single_path(vector(cartpole), lambda seen: seen[:, 0].numpy(), steps=1),
        "returned ndarray, and",
    ),
    "a dict for no dict": (
        lambda: single_path(vector(cartpole), lambda seen: {"dist": coin(seen)}, steps=1),
        r"returned \{'dist': \w+\}, and",
    ),
    "parts of two shapes": (
        lambda: single_path(
            vector(lambda: gym.make("Swimmer-v5")),
            lambda seen: (seen[:, 0], seen[:, :2]),
            steps=1,
        ),
        "a tuple of tensors of shapes",
    ),
    "actions that are not whole": (
        lambda: single_path(
            vector(cartpole), lambda seen: Normal(seen[:, 0] * 0 + 0.6, 0.01), steps=1
        ),
        r"such as 0\.\d+, and Discrete\(2\) takes whole numbers.*Categorical",
    ),
    "no state beside the distribution": (
        start_recurrent(lambda seen, state, starts: coin(seen)),
        r"recurrent policy returned one value.*return \(distribution, next state\)",
    ),
    "three values of a recurrent policy": (
        start_recurrent(lambda seen, state, starts: (coin(seen), seen, state)),
        "recurrent policy returned 3 values",
    ),
    "one action for all environments": (
        lambda: single_path(vector(cartpole), lambda seen: coin(seen[:1]), steps=1),
        r"actions have shape \(1,\), and there are 3 environments.*N = 3",
    ),
    "a recurrent policy without the dimension of time": (
        start_recurrent(lambda seen, state, starts: (coin(seen[0]), state)),
        r"actions have shape \(3,\), .*\(1, N, …\) with N = 3, since state= is given",
    ),
    "a recurrent policy of one environment without that of environments": (
        lambda: single_path(
            vector(cartpole, 1),
            lambda seen, state, starts: (coin(seen[0]), state),
            steps=1,
            state=torch.zeros(1, 1, 4),
        ),
        r"actions have shape \(1,\), .*\(1, N, …\)",
    ),
    "a next state that is None": (
        start_recurrent(lambda seen, state, starts: (in_time(seen), None)),
        "next state holds a NoneType; it must be a tensor",
    ),
    "a next state that all environments share": (
        start_recurrent(lambda seen, state, starts: (in_time(seen), state[:, :1])),
        r"next state holds a tensor of shape \(1, 1, 4\).* the 3 environments",
    ),
    "one distribution for a tuple of actions": (
        lambda: single_path(with_parts(gym.spaces.Tuple([GOALS, GOALS])), pairs, steps=1),
        "gives actions as Tensor, and .*Return a tuple of 2 distributions",
    ),
    "one distribution for a dict of actions": (
        lambda: single_path(with_parts(gym.spaces.Dict(a=GOALS, b=GOALS)), pairs, steps=1),
        r"gives actions as Tensor, and .*a dict of one distribution for each of \['a', 'b'\]",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_makes_no_sense_is_refused_by_name(name: str) -> None:
    call, message = REFUSED[name]
    with pytest.raises(TrustRegionError, match=message):
        call()
