"""Runs vine's branches: from captured states, with random numbers in common or not."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import gymnasium as gym
import numpy as np
import torch
from torch import Tensor

from trpo_optim.closure.random_state import random_state_kept
from trpo_optim.distributions import sample
from trpo_optim.distributions.nesting import mapped
from trpo_optim.rollouts.spaces import actions_for, stacked, tensors_of
from trpo_optim.snapshots.snapshot import Snapshot, restore

__all__ = ["Branches"]


@dataclass
class Branches:
    """Runs branches from states of different environments at once, each in its own."""

    envs: list[gym.Env[Any, Any]]
    policy: Callable[[Any], Any]
    critic: Callable[[Any], Tensor] | None
    horizon: int
    gamma: float
    device: torch.device | str
    steps: int = 0

    def values(
        self, states: list[tuple[int, Snapshot, Any]], actions: Any, *, common: bool
    ) -> Tensor:
        """Return one estimate of Q for each state and action, (S, K).

        Args:
            states: The number of the environment that each was taken from, itself, and its
                observation.
            actions: What to try there, (S, K, …).
            common: Whether the branches of a state meet the same random numbers.
        """
        envs = [self.envs[number] for number, *_ in states]
        width = _width(actions)
        seeds = torch.randint(2**62, (width, len(states) + 1))
        if common:
            seeds = seeds[:1].expand(width, -1)
        result = []
        for index in range(width):
            own, *noise = seeds[index].tolist()
            with random_state_kept([self.device], seed=own):
                for env, (_, snapshot, _), each in zip(envs, states, noise, strict=True):
                    restore(env, snapshot)
                    env.unwrapped.np_random = np.random.default_rng(each)
                first = mapped(lambda each: each[:, index], actions)  # noqa: B023 (used at once)
                result.append(self._returns(envs, [each for *_, each in states], first))
        return torch.stack(result, 1)

    def _returns(
        self, envs: list[gym.Env[Any, Any]], observations: list[Any], actions: Any
    ) -> Tensor:
        """Return the discounted return of one branch from each state, (S,)."""
        count = len(observations)
        space = envs[0].action_space
        returns, weights = np.zeros(count), np.ones(count)
        alive, open_ended = np.ones(count, dtype=bool), np.ones(count, dtype=bool)
        observations = list(observations)
        for step in range(self.horizon):
            if step:
                seen = tensors_of(stacked(observations), self.device)
                actions = sample(self.policy(seen))
            taken = actions_for(space, actions)
            for index in np.flatnonzero(alive):
                own = mapped(lambda each: each[index], taken)  # noqa: B023 (used at once)
                observation, reward, terminated, truncated, _ = envs[index].step(own)
                if not math.isfinite(reward):
                    raise ValueError(f"the reward was {reward}")
                observations[index] = observation
                returns[index] += weights[index] * float(reward)
                weights[index] *= self.gamma
                alive[index] = not (terminated or truncated)
                open_ended[index] = not terminated
                self.steps += 1
            if not alive.any():
                break
        total = torch.as_tensor(returns, dtype=torch.get_default_dtype(), device=self.device)
        if self.critic is None:
            return total
        rest = self.critic(tensors_of(stacked(observations), self.device)).reshape(-1)
        later = torch.as_tensor(weights, device=self.device).to(rest) * rest
        return total + torch.where(torch.as_tensor(open_ended, device=self.device), later, 0.0)


def _width(actions: Any) -> int:
    """Return K of actions of shape (S, K, …)."""
    while not isinstance(actions, Tensor):
        actions = next(iter(actions.values() if isinstance(actions, Mapping) else actions))
    return actions.shape[1]
