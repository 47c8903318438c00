"""Scaling of observations by running statistics, and how far it may move the policy."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import numpy as np
import torch
from gymnasium.wrappers.utils import RunningMeanStd
from processes import Processes, moments
from torch import Tensor
from torch.distributions import Distribution

from trpo_optim import frozen, mean_kl

if TYPE_CHECKING:
    from training_run import Run

SCALING_SHARE = 0.1
"""Which share of the radius a change of the observations' scaling may take in an update."""

SCALING_START = 10
"""From which update on; before, the statistics are those of a few episodes."""


class Normaliser:
    """Brings observations to zero mean and unit variance, clipped at 10."""

    def __init__(self, size: int, device: str) -> None:
        self.stats = RunningMeanStd(shape=(size,))
        self.device = device
        self.refresh()

    def refresh(self) -> None:
        """Take over the statistics."""
        mean, scale = self.stats.mean, np.sqrt(self.stats.var + 1e-8)
        self.mean, self.scale = (
            torch.as_tensor(each, dtype=torch.float32, device=self.device) for each in (mean, scale)
        )

    def update(self, observations: Tensor, processes: Processes | None = None) -> None:
        """Count further observations in, shape (B, D), and those of the other processes."""
        own = moments(observations)
        for each in [own] if processes is None else processes.all(own):
            self.stats.update_from_moments(*each)
        self.refresh()

    def __call__(self, observations: Tensor) -> Tensor:
        """Return them scaled."""
        return ((observations - self.mean) / self.scale).clamp_(-10, 10)


@torch.no_grad()
def follow(run: Run, observations: Tensor) -> None:
    """Let the scaling follow the statistics of observations, by a small part of the radius.

    New statistics change the policy as a step does, but no line search checks them. As an agent
    learns to balance, its deviations shrink and are scaled up, and its reactions grow until it
    falls.

    Args:
        run: The run.
        observations: Those of the last batch, shape (B, D).
    """
    scaling, limit = run.normalise, SCALING_SHARE * run.optimizer.param_groups[0]["max_kl"]
    old, mean, scale = frozen(run.act(observations)), scaling.mean, scaling.scale
    scaling.update(observations, run.processes)
    if run.update < SCALING_START:
        return
    new_mean, new_scale, share = scaling.mean, scaling.scale, 1.0
    while (kl := _moved(run, old, observations)) > limit:
        share *= 0.95 * math.sqrt(limit / kl)  # it goes with the square of what moves
        scaling.mean = torch.lerp(mean, new_mean, share)
        scaling.scale = torch.lerp(scale, new_scale, share)


def _moved(run: Run, old: Distribution, observations: Tensor) -> float:
    """Return the mean KL from an old policy to today's over the observations of all processes."""
    return float(np.mean(run.processes.all(float(mean_kl(old, run.act(observations))))))
