"""Trajectories as typed tensors: what a rollout returns, and where the next one goes on."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from trpo_optim.closure.random_state import random_state_kept
from trpo_optim.distributions import log_prob
from trpo_optim.distributions.nesting import mapped
from trpo_optim.errors import TrustRegionError
from trpo_optim.rollouts.arguments import require_one_a_row, values_by
from trpo_optim.rollouts.spaces import evaluated

__all__ = ["WITHOUT_LOG_PROB", "Cursor", "SinglePathBatch"]

WITHOUT_LOG_PROB = (
    "Its policy returned actions without a distribution, or a distribution without one "
    "log-probability for each action. For a Box action, return Independent(Normal(mean, std), 1). "
    "Or compute ln π(a|s) under the policy that drew the actions, and pass "
    "dataclasses.replace(batch, log_prob=...)."
)
"""Why a rollout has no log-probabilities, and what to do."""

_Array = np.ndarray[Any, Any]


@dataclass
class Cursor:
    """Where a rollout ended, so that the next one can go on from there. It can be pickled.

    Attributes:
        observations: The last observations, as the environments returned them.
        state: The policy's recurrent state, or None.
        starts: True where an episode begins with these observations, shape (N,).
        resetting: True where the next step only resets (``AutoresetMode.NEXT_STEP``), shape (N,).
        returns: The sums of rewards of the episodes in progress, shape (N,).
        lengths: The numbers of steps of these episodes, shape (N,).
        info: The requested entries of the environments' info, (N, …) by name. None if no entries
            were requested.

    Example:
        >>> import gymnasium as gym, torch
        >>> from torch.distributions import Categorical
        >>> from trpo_optim.rollouts import single_path
        >>> envs = gym.make_vec("CartPole-v1", num_envs=2, vectorization_mode="sync")
        >>> policy = lambda seen: Categorical(logits=torch.zeros(len(seen), 2))
        >>> cursor = single_path(envs, policy, steps=4).end
        >>> cursor.lengths
        array([4, 4])
        >>> batch = single_path(envs, policy, steps=4, after=cursor)
    """

    observations: Any
    state: Any
    starts: _Array
    resetting: _Array
    returns: _Array
    lengths: _Array
    info: dict[str, Any] | None = field(default=None, kw_only=True)


@dataclass(frozen=True, eq=False, repr=False)
class SinglePathBatch:
    """T steps of N environments, time first. A row is one step of one environment.

    Attributes:
        observations: The policy's observations, (T, N, …), in the form of the space.
        actions: The policy's actions, (T, N, …), before clipping.
        rewards: Shape (T, N).
        terminated: True where the episode terminated with the step, (T, N).
        truncated: True where the episode was truncated after the step, by a time limit for example,
            (T, N).
        starts: True where an episode begins, (T, N).
        valid: False for rows to leave out, (T, N): resets, and rows beyond the requested episodes.
        cut_observations: The observations after the last row of each trajectory that did not
            terminate, (K, …), for bootstrapping.
        cut_rows: The places (t, n) of these last rows, shape (K, 2).
        state: The policy's recurrent state before the first row, or None.
        episode_returns: Undiscounted returns of the episodes that ended in the batch, in order.
        episode_lengths: The numbers of steps of these episodes.
        end: Where the next rollout goes on.
        info: The entries that ``single_path(info=…)`` requested, (T, N, …) by name.
        log_prob: ln π(a|s) of the actions under the policy that drew them, (T, N). None if the
            policy returned actions without a distribution, or has no log-probability.

    Example:
        >>> import gymnasium as gym, torch
        >>> from torch.distributions import Categorical
        >>> from trpo_optim.rollouts import single_path
        >>> envs = gym.make_vec("CartPole-v1", num_envs=2, vectorization_mode="sync")
        >>> batch = single_path(envs, lambda seen: Categorical(logits=torch.zeros(2, 2)), steps=4)
        >>> batch.observations.shape, batch.rewards.shape
        (torch.Size([4, 2, 4]), torch.Size([4, 2]))
        >>> values, next_values = batch.values(lambda seen: torch.ones(len(seen)))
        >>> batch.flat(values)
        tensor([1., 1., 1., 1., 1., 1., 1., 1.])
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
    log_prob: Tensor | None = None

    def __repr__(self) -> str:
        """Return the sizes, and not the numbers, in one line."""
        steps, count = self.valid.shape
        return (
            f"SinglePathBatch({steps} steps of {count} environments, {int(self.valid.sum())} valid "
            f"rows, {len(self.episode_returns)} episodes ended)"
        )

    @property
    def ends(self) -> Tensor:
        """True where a trajectory does not go on with the next row, (T, N)."""
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
        """Return the critic's values of every row and of its next observation.

        Bootstrapping distinguishes termination (value 0) from truncation and the end of the batch
        (value of the final observation).

        Args:
            critic: From observations (B, …) to values, (B,) or (B, 1).

        Returns:
            V(sₜ) and V(sₜ₊₁), both (T, N).

        Raises:
            TrustRegionError: If the values have another shape.
        """
        steps, envs = self.rewards.shape
        rows = mapped(lambda each: each.flatten(0, 1), self.observations)
        values = values_by(critic, rows, steps * envs).view(steps, envs)
        following = torch.cat([values[1:], torch.zeros_like(values[:1])])
        if len(self.cut_rows):
            cut = values_by(critic, self.cut_observations, len(self.cut_rows))
            following[self.cut_rows[:, 0], self.cut_rows[:, 1]] = cut
        return values, following.masked_fill(self.terminated, 0.0)

    @torch.no_grad()
    def log_ratios(self, policy: Callable[..., Any]) -> Tensor:
        """Return ln π(a|s) − ln π_behaviour(a|s) of the actions, for a policy as it is now.

        ``gae`` and ``trajectory_weights`` take these. The call leaves the random state as it was.

        Args:
            policy: The policy π, called as in ``single_path``. With a recurrent state it is
                evaluated on whole trajectories, (T, N, …).

        Returns:
            Shape (T, N). It is 0 in rows that are not valid.

        Raises:
            TrustRegionError: If the batch has no log-probabilities, or those of the policy do not
                fit.
        """
        if self.log_prob is None:
            raise TrustRegionError(
                f"The batch has no log_prob, which log-ratios need. {WITHOUT_LOG_PROB}"
            )
        if not self.valid.any():
            return torch.zeros_like(self.log_prob)
        with random_state_kept([self.rewards.device]):
            if self.state is None:
                seen, actions, said = self.flat((self.observations, self.actions, self.info))
                logs = log_prob(evaluated(policy, seen, info=said), actions)
            else:
                given = self.observations, self.state, self.starts
                dist, _ = evaluated(policy, *given, info=self.info)
                logs = log_prob(dist, self.actions, self.valid)[self.valid]
        before = self.log_prob[self.valid]
        require_one_a_row(logs, len(before))
        ratios = torch.zeros_like(self.log_prob)
        ratios[self.valid] = (logs - before).to(ratios)
        return ratios
