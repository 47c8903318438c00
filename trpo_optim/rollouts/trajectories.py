"""Trajectories as typed tensors: what a rollout returns, and where the next one goes on."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from trpo_optim.distributions.nesting import mapped

__all__ = ["Cursor", "SinglePathBatch"]

_Array = np.ndarray[Any, Any]


@dataclass
class Cursor:
    """Where a rollout stands, so that the next one can go on from there; it can be pickled.

    Attributes:
        observations: The environments' last ones, as they returned them.
        state: The policy's recurrent state, or None.
        starts: Where an episode begins with these observations, shape (N,).
        resetting: Where the next step only resets (``AutoresetMode.NEXT_STEP``), shape (N,).
        returns: The sums of rewards of the episodes in progress, shape (N,).
        lengths: Their steps, shape (N,).
        info: What the environments say beside the observations, (N, …) by name; None where nothing
            was asked for.
    """

    observations: Any
    state: Any
    starts: _Array
    resetting: _Array
    returns: _Array
    lengths: _Array
    info: dict[str, Any] | None = field(default=None, kw_only=True)


@dataclass(frozen=True, eq=False)
class SinglePathBatch:
    """T steps of N environments, time first; a row is one step of one of them.

    Attributes:
        observations: What the policy saw, (T, N, …), in the space's form.
        actions: What it drew, (T, N, …), before clipping.
        rewards: Shape (T, N).
        terminated: True where the episode ended with the step for good, (T, N).
        truncated: True where it was cut off after the step, by a time limit say, (T, N).
        starts: True where an episode begins, (T, N).
        valid: False where a row is none, (T, N): a reset, or beyond the episodes asked for.
        cut_observations: What followed each row after which the batch does not go on, though the
            episode did not terminate, (K, …).
        cut_rows: Their places (t, n), shape (K, 2).
        state: The policy's recurrent state before the first row, or None.
        episode_returns: Undiscounted returns of the episodes that ended in the batch, in order.
        episode_lengths: Their lengths in steps.
        end: Where the next rollout goes on.
        info: What the environments said beside the observations, (T, N, …) by name: what
            ``single_path(info=…)`` asked for.
    """

    observations: Any
    actions: Any
    rewards: Tensor
    terminated: Tensor
    truncated: Tensor
    starts: Tensor
    valid: Tensor
    cut_observations: Any
    cut_rows: Tensor
    state: Any
    episode_returns: list[float]
    episode_lengths: list[int]
    end: Cursor
    info: dict[str, Any] = field(default_factory=dict)

    @property
    def ends(self) -> Tensor:
        """True where what follows a row is not the next one, (T, N)."""
        ends = self.terminated | self.truncated
        ends[-1] = True
        if len(self.cut_rows):
            ends[self.cut_rows[:, 0], self.cut_rows[:, 1]] = True
        return ends

    def flat(self, values: Any) -> Any:
        """Return the valid rows, (B, …), of tensors of shape (T, N, …)."""
        return mapped(lambda each: each[self.valid], values)

    @torch.no_grad()
    def values(self, critic: Callable[[Any], Tensor]) -> tuple[Tensor, Tensor]:
        """Return the critic's values of every row and of what followed it.

        Where the episode terminated nothing follows, which is worth 0; where it was truncated, or
        the batch ends, the last observation is.

        Args:
            critic: From observations (B, …) to values, (B,) or (B, 1).

        Returns:
            V(sₜ) and V(sₜ₊₁), both (T, N).
        """
        steps, envs = self.rewards.shape
        rows = mapped(lambda each: each.flatten(0, 1), self.observations)
        values = critic(rows).reshape(steps, envs)
        following = torch.cat([values[1:], torch.zeros_like(values[:1])])
        if len(self.cut_rows):
            cut = critic(self.cut_observations).reshape(-1)
            following[self.cut_rows[:, 0], self.cut_rows[:, 1]] = cut
        return values, following.masked_fill(self.terminated, 0.0)
