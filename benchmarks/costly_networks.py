"""Policies whose exact Fisher-vector products are dear: recurrence, convolutions and attention."""

from __future__ import annotations

from collections.abc import Callable

import torch
from scene import ACTIONS, OBSERVATIONS
from torch import Tensor, nn
from torch.distributions import Categorical, Distribution, Independent, Normal


class Recurrent(nn.Module):
    """A Gaussian policy with an LSTM of 128 units, on whole sequences."""

    def __init__(self) -> None:
        super().__init__()
        self.lstm, self.head = nn.LSTM(OBSERVATIONS, 128), nn.Linear(128, ACTIONS)
        self.log_std = nn.Parameter(torch.zeros(ACTIONS))

    def forward(self, observations: Tensor) -> Distribution:
        """Return the distribution over actions, from observations (T, N, 17)."""
        return Independent(Normal(self.head(self.lstm(observations)[0]), self.log_std.exp()), 1)


class Discrete(nn.Module):
    """A policy over discrete actions, by a network from observations to logits."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, observations: Tensor) -> Distribution:
        """Return the distribution over actions."""
        return Categorical(logits=self.network(observations))


def atari() -> nn.Module:
    """Return the paper's network for pictures (N, 4, 84, 84): 16 channels, and 20 hidden units."""
    return Discrete(
        nn.Sequential(
            nn.Conv2d(4, 16, 4, stride=2),
            nn.ReLU(),
            nn.Conv2d(16, 16, 4, stride=2),
            nn.ReLU(),
            nn.Flatten(),
            nn.Linear(16 * 19 * 19, 20),
            nn.ReLU(),
            nn.Linear(20, ACTIONS),
        )
    )


def encoder() -> nn.Module:
    """Return a transformer encoder of two layers, from (N, 16, 17) to an action of every step."""
    layer = nn.TransformerEncoderLayer(64, 4, 128, dropout=0.0, batch_first=True)
    body = nn.TransformerEncoder(layer, 2)
    return Discrete(nn.Sequential(nn.Linear(OBSERVATIONS, 64), body, nn.Linear(64, ACTIONS)))


NETWORKS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "LSTM, 64 × 32 steps": (Recurrent, (64, 32, OBSERVATIONS)),
    "the paper's CNN, 128 pictures": (atari, (128, 4, 84, 84)),
    "transformer encoder, 128 × 16 steps": (encoder, (128, 16, OBSERVATIONS)),
}
"""What makes each policy, and the shape of its observations."""
