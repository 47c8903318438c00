"""What vine is tried on: a frozen lake, a pendulum, and policies for them."""

from __future__ import annotations

import gymnasium as gym
import torch
from gymnasium.vector import SyncVectorEnv
from torch import Tensor, nn
from torch.distributions import Categorical, Distribution, Independent, Normal

GAMMA = 0.9


def lake() -> gym.Env[int, int]:
    return gym.make("FrozenLake-v1", is_slippery=True, max_episode_steps=100_000)


def lakes(count: int = 16) -> SyncVectorEnv:
    return SyncVectorEnv([lake] * count, autoreset_mode="SameStep")


class Table(nn.Module):
    """A policy by one logit for every state and action."""

    def __init__(self, seed: int = 0) -> None:
        super().__init__()
        noise = torch.Generator().manual_seed(seed)
        self.logits = nn.Parameter(torch.randn(16, 4, generator=noise))

    def forward(self, states: Tensor) -> Categorical:
        return Categorical(logits=self.logits[states])


class Swing(nn.Module):
    """A fixed random controller of the pendulum, with noise."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.network = nn.Sequential(nn.Linear(3, 16), nn.Tanh(), nn.Linear(16, 1))

    def forward(self, seen: Tensor) -> Distribution:
        return Independent(Normal(self.network(seen), torch.ones(1).to(seen)), 1)


def pendulums() -> SyncVectorEnv:
    return SyncVectorEnv([lambda: gym.make("Pendulum-v1")] * 8, autoreset_mode="SameStep")


def gradient(policy: nn.Module, loss: Tensor) -> Tensor:
    slopes = torch.autograd.grad(loss, list(policy.parameters()))
    return torch.cat([each.reshape(-1) for each in slopes])
