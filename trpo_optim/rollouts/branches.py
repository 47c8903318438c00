"""Runs vine's branches: from captured states, with random numbers in common or not."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import gymnasium as gym
import numpy as np
import torch
from torch import Tensor

from trpo_optim.closure.random_state import random_state_kept
from trpo_optim.distributions import sample
from trpo_optim.distributions.nesting import mapped
from trpo_optim.rollouts.arguments import values_by
from trpo_optim.rollouts.branch_actions import width
from trpo_optim.rollouts.infos import entries_of
from trpo_optim.rollouts.spaces import actions_for, array_of, evaluated, stacked, tensors_of
from trpo_optim.snapshots.snapshot import Snapshot, restore

__all__ = ["Branches", "State"]


@dataclass(frozen=True, eq=False)
class State:
    """A state of the trunk that branches begin at.

    Attributes:
        number: Of the environment that it was taken from.
        snapshot: The environment's state.
        observation: What was seen there.
        info: What was said beside it, by name.
    """

    number: int
    snapshot: Snapshot
    observation: Any
    info: dict[str, Any]


@dataclass
class Branches:
    """Runs branches from states of different environments at once, each in its own."""

    envs: list[gym.Env[Any, Any]]
    policy: Callable[..., Any]
    critic: Callable[[Any], Tensor] | None
    horizon: int
    gamma: float
    device: torch.device | str
    steps: int = 0

    def values(self, states: list[State], actions: Any, allowed: Tensor, *, common: bool) -> Tensor:
        """Return one estimate of Q for each state and action, (S, K).

        Args:
            states: Of different environments.
            actions: What to try there, (S, K, …).
            allowed: Which of these to run, (S, K); the others get NaN.
            common: Whether the branches of a state meet the same random numbers.
        """
        envs = [self.envs[state.number] for state in states]
        count = width(actions)
        seeds = torch.randint(2**62, (count, len(states) + 1), device="cpu")
        if common:
            seeds = seeds[:1].expand(count, -1)
        result = []
        for index in range(count):
            own, *noise = seeds[index].tolist()
            with random_state_kept([self.device], seed=own):
                for env, state, each in zip(envs, states, noise, strict=True):
                    restore(env, state.snapshot)
                    env.unwrapped.np_random = np.random.default_rng(each)
                first = mapped(lambda each: each[:, index], actions)  # noqa: B023 (used at once)
                run = allowed[:, index]
                returns = self._returns(envs, states, first, run.cpu().numpy())
                result.append(returns.where(run, math.nan))
        return torch.stack(result, 1)

    def _returns(
        self,
        envs: list[gym.Env[Any, Any]],
        states: list[State],
        actions: Any,
        run: np.ndarray[Any, Any],
    ) -> Tensor:
        """Return the discounted return of one branch from each state that is run, (S,)."""
        count = len(states)
        space = envs[0].action_space
        returns, weights = np.zeros(count), np.ones(count)
        alive, open_ended = run.copy(), np.ones(count, dtype=bool)
        observations, said = [each.observation for each in states], [each.info for each in states]
        for step in range(self.horizon):
            if not alive.any():
                break
            if step:
                seen, beside = (
                    tensors_of(stacked(each), self.device) for each in (observations, said)
                )
                actions = sample(evaluated(self.policy, seen, info=beside))
            taken = actions_for(space, actions)
            for index in np.flatnonzero(alive):
                own = mapped(lambda each: each[index], taken)  # noqa: B023 (used at once)
                observation, reward, terminated, truncated, info = envs[index].step(own)
                if not math.isfinite(reward):
                    raise ValueError(f"the reward was {reward}")
                observations[index] = mapped(array_of, observation)
                returns[index] += weights[index] * float(reward)
                weights[index] *= self.gamma
                alive[index] = not (terminated or truncated)
                open_ended[index] = not terminated
                if alive[index]:
                    said[index] = entries_of([info], said[index], 0, said[index])
                self.steps += 1
        total = torch.as_tensor(returns, dtype=torch.get_default_dtype(), device=self.device)
        if self.critic is None:
            return total
        rest = values_by(self.critic, tensors_of(stacked(observations), self.device), count)
        later = torch.as_tensor(weights, device=self.device).to(rest) * rest
        return total + torch.where(torch.as_tensor(open_ended, device=self.device), later, 0.0)
