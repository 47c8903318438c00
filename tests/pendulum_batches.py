"""Policies for a pendulum, and batches that they collected."""

from __future__ import annotations

import math

import gymnasium as gym
import torch
from gymnasium.vector import AutoresetMode, SyncVectorEnv
from torch import Tensor, nn
from torch.distributions import Distribution, Independent, Normal

from trpo_optim.rollouts import (
    SinglePathBatch,
    single_path,
)


class Gaussian(nn.Module):
    """An MLP's mean and one free scale."""

    def __init__(self) -> None:
        super().__init__()
        self.network = nn.Sequential(nn.Linear(3, 16), nn.Tanh(), nn.Linear(16, 1))
        self.log_std = nn.Parameter(torch.zeros(1))

    def forward(self, seen: Tensor) -> Distribution:
        return Independent(Normal(self.network(seen), self.log_std.exp()), 1)


def pendulum(mode: AutoresetMode = AutoresetMode.NEXT_STEP) -> SyncVectorEnv:
    return SyncVectorEnv(
        [lambda: gym.make("Pendulum-v1", max_episode_steps=17)] * 4, autoreset_mode=mode
    )


def feedforward(seed: int = 0, device: str = "cpu") -> tuple[Gaussian, SinglePathBatch, Tensor]:
    torch.manual_seed(seed)
    policy = Gaussian().to(device)
    batch = single_path(pendulum(), policy, steps=50, seed=0, device=device)
    return policy, batch, torch.randn(50, 4).to(device).masked_fill(~batch.valid, math.nan)


def vector_of(policy: nn.Module) -> Tensor:
    return torch.cat([each.detach().reshape(-1).clone() for each in policy.parameters()])
