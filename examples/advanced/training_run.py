"""What a training run carries from one update to the next."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np
import torch
from agent import Policy
from gymnasium.vector import SyncVectorEnv
from gymnasium.wrappers.utils import RunningMeanStd
from normaliser import Normaliser
from processes import Processes
from torch import Tensor, nn
from torch.distributions import Distribution

from trpo_optim import TrustRegionOptimizer
from trpo_optim.rollouts import Cursor, SinglePathBatch

if TYPE_CHECKING:
    from train import Args


def mean_of_last(episodes: Sequence[tuple[float, float]]) -> float:
    """Return the mean return of the last 20 of pairs of step and return."""
    return float(np.mean([value for _, value in episodes[-20:]] or [math.nan]))


@dataclass
class Run:
    """Everything that a run carries from one update to the next."""

    args: Args
    processes: Processes
    envs: SyncVectorEnv
    policy: Policy
    critic: nn.Sequential
    critic_of_all: nn.Module  # the same, with the gradients of all processes
    optimizer: TrustRegionOptimizer
    critic_optimizer: torch.optim.Adam
    normalise: Normaliser
    discounted: Tensor  # return so far of each environment's episode, (N,)
    return_stats: RunningMeanStd = field(default_factory=RunningMeanStd)
    end: Cursor | None = None  # where the environments stand
    batches: list[SinglePathBatch] = field(default_factory=list)  # the last ones, newest first
    update: int = 0
    episodes: list[tuple[float, float]] = field(default_factory=list)  # step, return
    kls: list[tuple[float, float]] = field(default_factory=list)  # step, KL of the update

    @property
    def step(self) -> int:
        """Environment steps so far."""
        return self.update * self.args.batch_size

    def recent_return(self) -> float:
        """Mean return of the last 20 episodes."""
        return mean_of_last(self.episodes)

    def act(self, observations: Tensor) -> Distribution:
        """Return the policy on observations as the environments give them."""
        dist: Distribution = self.policy(self.normalise(observations))
        return dist

    def value(self, observations: Tensor) -> Tensor:
        """Return the critic on observations as the environments give them."""
        value: Tensor = self.critic(self.normalise(observations))
        return value
