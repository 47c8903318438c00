"""Actions and observations of every space reach environments and policies in their form."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
import torch
from gymnasium import wrappers
from gymnasium.vector import SyncVectorEnv
from small_environments import cartpole, coin, vector
from torch import Tensor
from torch.distributions import Categorical, Independent, Normal

from trpo_optim.rollouts import SinglePathBatch, single_path

SHORT: tuple[Any, Any] = gym.spaces.Discrete(2), gym.spaces.MultiDiscrete([2, 3], np.int32)
SHORT[0].dtype = np.dtype(np.int32)  # Gymnasium 1.1 takes no such argument


def known(space: gym.Space[Any], action: Any) -> Any:
    """Return an action after the check that many environments begin a step with."""
    assert space.contains(action)
    return action


SPACES: dict[str, tuple[gym.Space[Any], Callable[[Any], Any], Callable[[Tensor], Any]]] = {
    "MultiDiscrete": (
        gym.spaces.MultiDiscrete([2, 3], start=[0, 5]),
        lambda action: int(action[0]),
        lambda n: (Categorical(torch.ones(len(n), 2)), Categorical(torch.ones(len(n), 3))),
    ),
    "MultiBinary": (
        gym.spaces.MultiBinary(3),
        lambda action: int(action[0]),
        lambda n: Independent(torch.distributions.Bernoulli(torch.full((len(n), 3), 0.5)), 1),
    ),
    "Box": (
        gym.spaces.Box(-0.1, 0.1, (2, 2), np.float32),
        lambda action: int(action[0, 1] > 0),
        lambda n: Independent(Normal(torch.zeros(len(n), 4), torch.ones(4)), 1),
    ),
    "Box by rows": (
        gym.spaces.Box(-0.1, 0.1, (2, 2), np.float32),
        lambda action: int(action[0, 1] > 0),
        lambda n: [Independent(Normal(torch.zeros(len(n), 2), torch.ones(2)), 1)] * 2,
    ),
    "Discrete from -1 on": (
        gym.spaces.Discrete(2, start=-1),
        lambda action: int(action) + 1,
        coin,
    ),
    "Discrete of four bytes": (SHORT[0], lambda action: int(known(SHORT[0], action)), coin),
    "MultiDiscrete of four bytes": (
        SHORT[1],
        lambda action: int(known(SHORT[1], action)[0]),
        lambda n: (coin(n), Categorical(torch.ones(len(n), 3))),
    ),
    "Dict of a Tuple": (
        gym.spaces.Dict(
            {
                "push": gym.spaces.Discrete(2),
                "rest": gym.spaces.Tuple([gym.spaces.Box(-1, 1, (1,)), gym.spaces.Discrete(3)]),
            }
        ),
        lambda action: int(action["push"]),
        lambda n: {
            "push": coin(n),
            "rest": (
                Independent(Normal(torch.zeros(len(n), 1), torch.ones(1)), 1),
                Categorical(torch.ones(len(n), 3)),
            ),
        },
    ),
}


@pytest.mark.parametrize("name", SPACES)
def test_actions_of_every_space_reach_the_environments_in_its_form(name: str) -> None:
    space, push, dist = SPACES[name]
    seen = []

    def taken(action: Any) -> int:
        assert space.contains(action), action
        seen.append(action)
        return int(push(action))

    envs = vector(lambda: wrappers.TransformAction(cartpole(), taken, space), 2)
    batch = single_path(envs, dist, steps=30, seed=0)
    assert len(seen) == 60
    assert len({str(each) for each in seen}) > 1
    assert int(batch.valid.sum()) == 60


def test_observations_of_nested_spaces_keep_their_form() -> None:
    space = gym.spaces.Dict(
        {
            "all": gym.spaces.Box(-np.inf, np.inf, (4,), np.float64),
            "more": gym.spaces.Tuple(
                [gym.spaces.Discrete(2), gym.spaces.Box(0, 255, (2, 2, 1), np.uint8)]
            ),
        }
    )

    def nested(observation: Any) -> Any:
        image = np.full((2, 2, 1), int(abs(observation[2]) * 1000) % 256, np.uint8)
        return {
            "all": observation.astype(np.float64),
            "more": (np.int64(observation[0] > 0), image),
        }

    forms = []

    def policy(seen: Any) -> Categorical:
        forms.append((seen["all"].dtype, seen["more"][0].shape, seen["more"][1].dtype))
        return coin(seen["all"])

    envs = vector(lambda: wrappers.TransformObservation(cartpole(), nested, space), 2)
    batch = single_path(envs, policy, steps=40, seed=0)
    assert set(forms) == {(torch.float32, (2,), torch.uint8)}
    assert batch.observations["more"][1].shape == (40, 2, 2, 2, 1)
    assert batch.flat(batch.observations)["all"].shape == (80, 4)
    values, following = batch.values(lambda seen: seen["all"][:, 0])
    assert values.shape == following.shape == (40, 2)
    assert len(batch.cut_rows) == len(batch.cut_observations["more"][0]) > 2


def test_a_policy_may_return_the_actions_themselves() -> None:
    batch = single_path(vector(cartpole), lambda seen: (seen[:, 3] > 0).long(), steps=30, seed=0)
    assert torch.equal(batch.actions, (batch.observations[..., 3] > 0).long())


def test_environments_that_reuse_their_memory_do_no_harm() -> None:
    def collected(*, copy: bool) -> SinglePathBatch:
        torch.manual_seed(0)
        return single_path(
            SyncVectorEnv([cartpole] * 2, copy=copy, autoreset_mode="SameStep"),
            coin,
            steps=30,
            seed=0,
        )

    shared, own = collected(copy=False), collected(copy=True)
    assert torch.equal(shared.observations, own.observations)
    assert torch.equal(shared.cut_observations, own.cut_observations)


def test_continuous_actions_are_kept_as_they_were_drawn() -> None:
    envs = vector(lambda: gym.make("Pendulum-v1"), 2)
    wide = lambda seen: Independent(Normal(torch.zeros(len(seen), 1), torch.full((1,), 9.0)), 1)  # noqa: E731
    assert single_path(envs, wide, steps=30, seed=0).actions.abs().max() > 2.0
