"""Policies of every kind trained from scratch: each ends far above chance, within every radius."""

from __future__ import annotations

import math
from typing import Any

import agent
import gymnasium as gym
import numpy as np
import pytest
import torch
from gymnasium.envs.toy_text.taxi import TaxiEnv
from learner import (
    Bandit,
    Learner,
    act,
    beta_kl,
    categorical_kl,
    learn_environment,
    multi_discrete_kl,
    normal_kl,
    sampled_mixture_kl,
    squashed_normal_kl,
)
from torch import Tensor, nn
from torch.distributions import (
    Beta,
    Categorical,
    Distribution,
    Independent,
    MixtureSameFamily,
    Normal,
    TanhTransform,
    TransformedDistribution,
)
from torch.nn.functional import one_hot, softplus
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

pytestmark = pytest.mark.learns

SEED = 0
SYMBOLS, STEPS = 4, 8


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(SEED)


def show_symbols(rows: int) -> tuple[Tensor, Tensor]:
    """Return sequences of 3 to 8 steps, of which only the first shows the symbol; and the symbols.

    The last channel is 1 up to the sequence's end; then all are 0.
    """
    symbols = torch.randint(SYMBOLS, (rows,))
    observations = 0.3 * torch.randn(rows, STEPS, SYMBOLS + 1)
    observations[:, 0, :SYMBOLS] = one_hot(symbols, SYMBOLS).float()
    observations[..., -1] = 1
    going_on = torch.arange(STEPS) < torch.randint(3, STEPS + 1, (rows, 1))
    return observations * going_on.unsqueeze(-1), symbols


def valid(observations: Tensor) -> Tensor:
    return observations[..., -1] == 1


def at_end(sequence: Tensor, observations: Tensor) -> Tensor:
    """Return each row's element at its last valid step."""
    return sequence[torch.arange(len(sequence)), valid(observations).sum(1) - 1]


class LSTMPolicy(nn.Module):
    """Acts after the last step, or after every one."""

    def __init__(self, *, every_step: bool) -> None:
        super().__init__()
        self.every_step = every_step
        self.lstm = nn.LSTM(SYMBOLS + 1, 32, batch_first=True)
        self.head = nn.Linear(32, SYMBOLS)

    def forward(self, observations: Tensor) -> Distribution:
        lengths = valid(observations).sum(1)
        packed = pack_padded_sequence(observations, lengths, batch_first=True, enforce_sorted=False)
        outputs, (last, _) = self.lstm(packed)
        if self.every_step:
            padded, _ = pad_packed_sequence(outputs, batch_first=True, total_length=STEPS)
            return Categorical(logits=self.head(padded))
        return Categorical(logits=self.head(last[0]))


class AttentionPolicy(nn.Module):
    """Acts after the last step."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Linear(SYMBOLS + 1, 16)
        self.position = nn.Parameter(0.1 * torch.randn(STEPS, 16))
        layer = nn.TransformerEncoderLayer(
            16, nhead=2, dim_feedforward=32, dropout=0, batch_first=True
        )
        self.encoder = nn.TransformerEncoder(layer, num_layers=1)
        self.head = nn.Linear(16, SYMBOLS)

    def forward(self, observations: Tensor) -> Distribution:
        embedded = self.embedding(observations) + self.position
        encoded = self.encoder(embedded, src_key_padding_mask=~valid(observations))
        return Categorical(logits=self.head(at_end(encoded, observations)))


class MemorylessPolicy(nn.Module):
    """Acts after the last step on that alone."""

    def __init__(self) -> None:
        super().__init__()
        self.network = agent.mlp(SYMBOLS + 1, 32, SYMBOLS, gain=0.01)

    def forward(self, observations: Tensor) -> Distribution:
        return Categorical(logits=self.network(at_end(observations, observations)))


RECALL = Bandit(show_symbols, lambda actions, symbols: (actions == symbols).float())


def test_an_lstm_recalls_the_first_symbol_of_a_sequence() -> None:
    learner = Learner(LSTMPolicy(every_step=False), categorical_kl)
    assert RECALL.learn(learner, updates=40) > 0.9  # chance: 0.25


def test_an_lstm_that_acts_at_every_step_learns_on_padded_sequences() -> None:
    task = Bandit(
        show_symbols, lambda actions, symbols: (actions == symbols[:, None]).float(), mask=valid
    )
    learner = Learner(LSTMPolicy(every_step=True), categorical_kl)
    assert task.learn(learner, updates=40) > 0.9  # chance: 0.25


def test_attention_recalls_the_first_symbol_of_a_sequence() -> None:
    learner = Learner(AttentionPolicy(), categorical_kl)
    assert RECALL.learn(learner, updates=40) > 0.9  # chance: 0.25


def test_without_memory_the_first_symbol_is_never_recalled() -> None:
    learner = Learner(MemorylessPolicy(), categorical_kl)
    assert RECALL.learn(learner, updates=40) < 0.4  # chance: 0.25


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
    """Return noisy images of 16 × 16 with a letter anywhere; and the letters."""
    classes = torch.randint(len(SHAPES), (rows,))
    images = 0.2 * torch.randn(rows, 1, 16, 16)
    for image, letter, (top, left) in zip(
        images, SHAPES[classes], torch.randint(12, (rows, 2)).tolist(), strict=True
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
    learner = Learner(policy, categorical_kl, max_kl=0.05)
    assert IMAGES.learn(learner, updates=30, rows=384) > 0.85  # chance: 0.25


def test_a_linear_policy_cannot_tell_shapes_in_images() -> None:
    policy = LogitsPolicy(nn.Flatten(), nn.Linear(256, len(SHAPES)))
    learner = Learner(policy, categorical_kl, max_kl=0.05)
    assert IMAGES.learn(learner, updates=30, rows=384) < 0.5  # chance: 0.25


class Taxi(gym.ObservationWrapper[Any, Any, Any]):
    """Shows the state one-hot and the legal actions behind it; refuses illegal ones."""

    def __init__(self) -> None:
        super().__init__(gym.wrappers.TimeLimit(TaxiEnv(), 200))
        self.taxi: Any = self.unwrapped
        self.observation_space = gym.spaces.Box(0, 1, (506,), np.float32)

    def observation(self, observation: int) -> Any:
        shown = np.zeros(506, dtype=np.float32)
        shown[observation] = 1
        shown[500:] = self.taxi.action_mask(observation)
        return shown

    def step(self, action: Any) -> Any:
        assert self.taxi.action_mask(self.taxi.s)[action] == 1
        return super().step(action)


class TaxiPolicy(nn.Module):
    """A table of logits, of which only those of legal actions count."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Linear(500, 6)

    def forward(self, observations: Tensor) -> Distribution:
        state, legal = observations.split([500, 6], -1)
        return Categorical(logits=self.table(state).masked_fill(legal == 0, -math.inf))


def test_a_masked_policy_learns_to_drive_a_taxi_without_an_illegal_action() -> None:
    score = learn_environment(
        Taxi,
        Learner(TaxiPolicy(), categorical_kl, max_kl=0.05),
        nn.Sequential(nn.Linear(506, 1)),
        seed=SEED,
        gamma=0.99,
        critic_lr=0.05,
        updates=20,
    )
    assert score > 0  # legal actions at random: -186; the best mean: 8


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
    assert task.learn(Learner(policy, multi_discrete_kl), updates=60) > 0.85
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
    assert task.learn(Learner(policy, car_kl), updates=60) > 0.8
    actions = act(policy, draw(99)[0])
    for gear, throttle in zip(actions["gear"].numpy(), actions["throttle"].numpy(), strict=True):
        assert space.contains({"gear": gear, "throttle": throttle})


class BetaPolicy(nn.Module):
    """Torque between 0 and 1."""

    def __init__(self) -> None:
        super().__init__()
        self.network = agent.mlp(3, 64, 2, gain=0.01)

    def forward(self, observations: Tensor) -> Distribution:
        return Independent(Beta(*(1 + softplus(self.network(observations))).split(1, -1)), 1)


class SquashedPolicy(nn.Module):
    """Torque between −1 and 1."""

    def __init__(self) -> None:
        super().__init__()
        self.network = agent.mlp(3, 64, 1, gain=0.01)
        self.log_std = nn.Parameter(torch.full((1,), -0.5))

    def forward(self, observations: Tensor) -> Distribution:
        mean = self.network(observations).clamp(-3, 3)  # so that no action rounds to ±1
        normal = Independent(Normal(mean, self.log_std.exp()), 1)
        return TransformedDistribution(normal, [TanhTransform(cache_size=1)])


def swing_up(learner: Learner, lowest: float, **amount: int) -> float:
    """Return the score on Pendulum-v1 with actions from there to 1."""

    def make() -> gym.Env[Any, Any]:
        env = gym.wrappers.RescaleObservation(
            gym.make("Pendulum-v1"), np.float32(-1), np.float32(1)
        )
        return gym.wrappers.RescaleAction(env, np.float32(lowest), np.float32(1))

    critic = agent.mlp(3, 64, 1, gain=1.0)
    return learn_environment(make, learner, critic, seed=SEED, gamma=0.9, critic_lr=3e-3, **amount)


def test_a_beta_policy_swings_a_pendulum_up() -> None:
    learner = Learner(BetaPolicy(), beta_kl)
    assert swing_up(learner, 0, updates=50, batch_size=1000) > -450  # at random: -1200


def test_a_squashed_gaussian_swings_a_pendulum_up() -> None:
    learner = Learner(SquashedPolicy(), squashed_normal_kl)
    assert swing_up(learner, -1, updates=35) > -450  # at random: -1200


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
    learner = Learner(policy, sampled_mixture_kl, sampled=True)
    assert task.learn(learner, updates=60, rows=2048) > 0.85
