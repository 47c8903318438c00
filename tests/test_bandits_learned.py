"""Images, several actions at once and mixtures, learned from scratch within every radius."""

from __future__ import annotations

from typing import Any

import agent
import gymnasium as gym
import numpy as np
import pytest
import torch
from learner import (
    Bandit,
    Learner,
    act,
    categorical_kl,
    multi_discrete_kl,
    normal_kl,
    sampled_mixture_kl,
)
from torch import Tensor, nn
from torch.distributions import (
    Categorical,
    Distribution,
    Independent,
    MixtureSameFamily,
    Normal,
)

pytestmark = pytest.mark.learns

SEED = 0


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(SEED)


SIDE = 13
SHAPES = torch.tensor(
    [
        [[0, 0, 1, 0, 0], [0, 0, 1, 0, 0], [1, 1, 1, 1, 1], [0, 0, 1, 0, 0], [0, 0, 1, 0, 0]],
        [[1, 0, 0, 0, 1], [0, 1, 0, 1, 0], [0, 0, 1, 0, 0], [0, 1, 0, 1, 0], [1, 0, 0, 0, 1]],
        [[1, 1, 1, 1, 1], [0, 0, 1, 0, 0], [0, 0, 1, 0, 0], [0, 0, 1, 0, 0], [0, 0, 1, 0, 0]],
        [[1, 0, 0, 0, 0], [1, 0, 0, 0, 0], [1, 0, 0, 0, 0], [1, 0, 0, 0, 0], [1, 1, 1, 1, 1]],
    ]
)
"""Four letters, + X T L, of as many pixels each."""


def draw_images(rows: int) -> tuple[Tensor, Tensor]:
    """Return noisy square images with a letter anywhere; and the letters."""
    classes = torch.randint(len(SHAPES), (rows,))
    images = 0.2 * torch.randn(rows, 1, SIDE, SIDE)
    for image, letter, (top, left) in zip(
        images, SHAPES[classes], torch.randint(SIDE - 4, (rows, 2)).tolist(), strict=True
    ):
        image[0, top : top + 5, left : left + 5] += letter
    return images, classes


class LogitsPolicy(nn.Module):
    """Any network whose output is taken for logits."""

    def __init__(self, *layers: nn.Module) -> None:
        super().__init__()
        self.network = nn.Sequential(*layers)

    def forward(self, observations: Tensor) -> Distribution:
        return Categorical(logits=self.network(observations))


IMAGES = Bandit(draw_images, lambda actions, classes: (actions == classes).float())


def test_a_cnn_learns_to_tell_shapes_in_images() -> None:
    policy = LogitsPolicy(
        nn.Conv2d(1, 8, 5),
        nn.ReLU(),
        nn.MaxPool2d(3),
        nn.Conv2d(8, 16, 2),
        nn.ReLU(),
        nn.AdaptiveMaxPool2d(1),
        nn.Flatten(),
        nn.Linear(16, len(SHAPES)),
    )
    learner = Learner(policy, categorical_kl, max_kl=0.1)
    assert IMAGES.learn(learner, updates=18, rows=384) > 0.85  # chance: 0.25


def test_a_linear_policy_cannot_tell_shapes_in_images() -> None:
    policy = LogitsPolicy(nn.Flatten(), nn.Linear(SIDE * SIDE, len(SHAPES)))
    learner = Learner(policy, categorical_kl, max_kl=0.1)
    assert IMAGES.learn(learner, updates=18, rows=384) < 0.5  # chance: 0.25


class MultiDiscretePolicy(nn.Module):
    """One head per part of the space."""

    def __init__(self, space: gym.spaces.MultiDiscrete) -> None:
        super().__init__()
        self.sizes = space.nvec.tolist()
        self.network = agent.mlp(4, 32, sum(self.sizes), gain=0.01)

    def forward(self, observations: Tensor) -> tuple[Distribution, ...]:
        heads = self.network(observations).split(self.sizes, -1)
        return tuple(Categorical(logits=logits) for logits in heads)


def test_a_policy_of_several_discrete_parts_gets_all_of_them_right() -> None:
    space = gym.spaces.MultiDiscrete([3, 4, 2], seed=SEED)
    maps = [torch.randn(4, size) for size in space.nvec.tolist()]

    def draw(rows: int) -> tuple[Tensor, Tensor]:
        contexts = torch.randn(rows, 4)
        return contexts, torch.stack([(contexts @ each).argmax(-1) for each in maps], -1)

    task = Bandit(draw, lambda actions, right: (actions == right).float().mean(-1))
    policy = MultiDiscretePolicy(space)
    chance = task.score(lambda rows: torch.tensor(np.stack([space.sample() for _ in rows])))
    assert chance < 0.4  # (1/3 + 1/4 + 1/2) / 3
    learner = Learner(policy, multi_discrete_kl, max_kl=0.15)
    assert task.learn(learner, updates=20) > 0.85
    assert all(space.contains(action) for action in act(policy, torch.randn(99, 4)).numpy())


class CarPolicy(nn.Module):
    """A dict of a discrete and a continuous part."""

    def __init__(self) -> None:
        super().__init__()
        self.network = agent.mlp(2, 32, 4, gain=0.01)
        self.log_std = nn.Parameter(torch.zeros(1))

    def forward(self, observations: Tensor) -> dict[str, Distribution]:
        logits, mean = self.network(observations).split([3, 1], -1)
        throttle = Independent(Normal(mean, self.log_std.exp()), 1)
        return {"gear": Categorical(logits=logits), "throttle": throttle}


def car_kl(old: Any, new: Any, actions: Any) -> Tensor:
    gear = categorical_kl(old["gear"], new["gear"], actions)
    return gear + normal_kl(old["throttle"], new["throttle"], actions)


def test_a_policy_of_discrete_and_continuous_parts_learns_both_together() -> None:
    space = gym.spaces.Dict(
        {
            "gear": gym.spaces.Discrete(3),
            "throttle": gym.spaces.Box(-np.inf, np.inf, (1,), np.float32),
        },
        seed=SEED,
    )

    def draw(rows: int) -> tuple[Tensor, Tensor]:
        roads = 2 * torch.rand(rows, 2) - 1
        return roads, roads

    def reward(actions: Any, roads: Tensor) -> Tensor:
        speed, slope = roads.unbind(-1)
        right_gear = (3 * (speed + 1) / 2).long()
        miss = actions["throttle"].squeeze(-1) - slope * (right_gear + 1) / 2
        return torch.where(actions["gear"] == right_gear, (-2 * miss.square()).exp(), 0)

    def at_random(roads: Tensor) -> dict[str, Tensor]:
        drawn = [space.sample() for _ in roads]
        return {name: torch.tensor(np.stack([each[name] for each in drawn])) for name in space}

    task = Bandit(draw, reward)
    policy = CarPolicy()
    assert task.score(at_random) < 0.2
    assert task.learn(Learner(policy, car_kl, max_kl=0.15), updates=20) > 0.8
    actions = act(policy, draw(99)[0])
    for gear, throttle in zip(actions["gear"].numpy(), actions["throttle"].numpy(), strict=True):
        assert space.contains({"gear": gear, "throttle": throttle})


class MixturePolicy(nn.Module):
    """Two Gaussians in the plane."""

    def __init__(self) -> None:
        super().__init__()
        self.network = agent.mlp(2, 32, 6, gain=1.0)
        self.log_std = nn.Parameter(torch.zeros(2, 2))

    def forward(self, observations: Tensor) -> Distribution:
        logits, means = self.network(observations).split([2, 4], -1)
        parts = Independent(Normal(means.unflatten(-1, (2, 2)), self.log_std.exp()), 1)
        return MixtureSameFamily(Categorical(logits=logits), parts)


def test_a_mixture_finds_a_good_action_by_the_sampled_kl() -> None:
    def draw(rows: int) -> tuple[Tensor, Tensor]:
        contexts = torch.randn(rows, 2)
        goal = 2 * torch.nn.functional.normalize(contexts, dim=-1)
        return contexts, torch.stack([goal, -goal], 1)

    def reward(actions: Tensor, goals: Tensor) -> Tensor:
        misses = (actions.unsqueeze(1) - goals).square().sum(-1)
        return (-misses).exp().amax(-1)

    task = Bandit(draw, reward)
    policy = MixturePolicy()
    assert task.score(torch.randn_like) < 0.2
    learner = Learner(policy, sampled_mixture_kl, max_kl=0.15, sampled=True)
    assert task.learn(learner, updates=20, rows=1024) > 0.85
