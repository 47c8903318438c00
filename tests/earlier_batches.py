"""Batches of earlier policies for a pendulum, the newest first."""

from __future__ import annotations

from typing import Any

import gymnasium as gym
import torch
from gymnasium.vector import SyncVectorEnv
from pendulum_batches import Gaussian, pendulum
from test_recurrent_closures import Recurrent
from torch import Tensor, nn

from trpo_optim.rollouts import SinglePathBatch, single_path

Batches = tuple[Any, list[SinglePathBatch], list[Tensor]]


def stirred(policy: nn.Module, seed: int, size: float = 0.1) -> None:
    """Move a policy by chance."""
    noise = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in policy.parameters():
            step = size * torch.randn(parameter.shape, generator=noise)
            parameter.add_(step.to(parameter.device))


def feedforward_batches(device: str = "cpu") -> Batches:
    """Return batches of 50, 20 and 30 steps, the newest first, each of another policy."""
    torch.manual_seed(0)
    policy, batches = Gaussian().to(device), list[SinglePathBatch]()
    envs = pendulum()
    for steps in (30, 20, 50):
        if batches:
            stirred(policy, steps)
        after = {"after": batches[0]} if batches else {"seed": 0}
        batches.insert(0, single_path(envs, policy, steps=steps, device=device, **after))
    return policy, batches, advantages_of(batches)


def recurrent_batches() -> Batches:
    """Return batches of different lengths and numbers of environments, the newest first."""
    torch.manual_seed(0)
    policy, batches = Recurrent(), list[SinglePathBatch]()
    for steps, count in ((30, 4), (20, 3)):
        if batches:
            stirred(policy, 7)
        envs = SyncVectorEnv([lambda: gym.make("Pendulum-v1", max_episode_steps=17)] * count)
        start = (torch.zeros(1, count, 8),)
        first = single_path(envs, policy, steps=9, state=start, seed=steps)
        batches.insert(0, single_path(envs, policy, steps=steps, after=first))
    return policy, batches, advantages_of(batches)


def advantages_of(batches: list[SinglePathBatch]) -> list[Tensor]:
    noise = torch.Generator().manual_seed(5)
    return [
        torch.randn(batch.rewards.shape, generator=noise)
        .to(batch.rewards.device)
        .masked_fill(~batch.valid, torch.nan)
        for batch in batches
    ]
