"""What acts in the vine example: policy and critic, on vectors or on Atari's frames."""

from __future__ import annotations

import math

import gymnasium as gym
import numpy as np
import torch
from agent import mlp
from gymnasium.vector import SyncVectorEnv
from gymnasium.wrappers.utils import RunningMeanStd
from normaliser import Normaliser
from torch import Tensor, nn
from torch.distributions import Categorical, Distribution, Independent, Normal


def pixels(outputs: int, gain: float) -> nn.Sequential:
    """Return the paper's network for Atari: two convolutions of 16 channels, then 20 units."""
    head = nn.Linear(20, outputs)
    nn.init.orthogonal_(head.weight, gain)
    first, second = nn.Conv2d(4, 16, 4, 2), nn.Conv2d(16, 16, 4, 2)
    body = (nn.Flatten(), nn.Linear(16 * 9 * 9, 20), nn.ReLU(), head)
    return nn.Sequential(first, nn.ReLU(), second, nn.ReLU(), *body)


class Frames:
    """Subtracts each pixel's mean, and divides by the standard deviation over all pixels.

    Without it Pong's ball is lost in the field.
    """

    def __init__(self, size: tuple[int, ...], device: str) -> None:
        self.stats = RunningMeanStd(shape=size)
        self.device = device
        self.refresh()

    def refresh(self) -> None:
        """Take over the statistics."""
        self.mean = torch.as_tensor(self.stats.mean, dtype=torch.float32, device=self.device)
        self.scale = math.sqrt(self.stats.var.mean())

    def update(self, frames: Tensor) -> None:
        """Count further frames in, the latest of each stack, (B, K, H, W)."""
        self.stats.update(frames[:, -1].cpu().numpy())
        self.refresh()

    def __call__(self, frames: Tensor) -> Tensor:
        """Return them as numbers, in the layout that convolutions are fastest in on a CPU."""
        numbers = frames.to(torch.float32, memory_format=torch.channels_last)
        return ((numbers - self.mean) / self.scale).clamp_(-10, 10)


class Agent(nn.Module):
    """Policy and critic, on observations as the environments give them."""

    def __init__(self, envs: SyncVectorEnv, device: str = "cpu") -> None:
        super().__init__()
        space, actions = envs.single_observation_space, envs.single_action_space
        self.discrete = isinstance(actions, gym.spaces.Discrete)
        if isinstance(actions, gym.spaces.Discrete):
            outputs = int(actions.n)
        elif isinstance(actions, gym.spaces.Box):
            outputs = math.prod(actions.shape)
        else:
            raise SystemExit(f"The action space is {actions}; this loop knows Box and Discrete.")
        self.scaled: Frames | Normaliser
        if space.dtype == np.uint8:
            self.scaled = Frames((space.shape or ())[1:], device)
            self.policy, self.critic = pixels(outputs, 0.01), pixels(1, 1.0)
        else:
            size = math.prod(space.shape or ())
            self.scaled = Normaliser(size, device)
            self.policy, self.critic = mlp(size, 64, outputs, 0.01), mlp(size, 64, 1, 1.0)
        self.log_std = nn.Parameter(torch.zeros(outputs), requires_grad=not self.discrete)
        self.to(device)

    def act(self, observations: Tensor) -> Distribution:
        """Return the distribution over actions."""
        output = self.policy(self.scaled(observations))
        if self.discrete:
            return Categorical(logits=output)
        return Independent(Normal(output, self.log_std.exp()), 1)

    def value(self, observations: Tensor) -> Tensor:
        """Return the critic's value, shape (B,)."""
        value: Tensor = self.critic(self.scaled(observations)).squeeze(-1)
        return value

    def count(self, observations: Tensor) -> None:
        """Count observations into the normalisation."""
        self.scaled.update(observations)
