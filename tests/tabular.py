"""Gymnasium's own tabular environments, as processes that can be solved exactly."""

from __future__ import annotations

from typing import Any

import gymnasium as gym
import torch
from torch import Tensor

from trpo_optim.theory import TabularMDP


def tabular(env: gym.Env[Any, Any], gamma: float) -> TabularMDP:
    """Return an environment of toy text by its table; a further state stands for the end."""
    inner: Any = env.unwrapped
    states, actions = int(inner.observation_space.n), int(inner.action_space.n)
    transitions = torch.zeros(states + 1, actions, states + 1, dtype=torch.float64)
    rewards = torch.zeros(states + 1, actions, dtype=torch.float64)
    transitions[states, :, states] = 1.0
    for state, row in inner.P.items():
        for action, branches in row.items():
            for share, following, reward, terminated in branches:
                transitions[state, action, states if terminated else following] += share
                rewards[state, action] += share * reward
    start = torch.zeros(states + 1, dtype=torch.float64)
    start[:states] = torch.as_tensor(inner.initial_state_distrib)
    return TabularMDP(transitions, rewards, start, gamma)


def table(logits: Tensor) -> Tensor:
    """Return π(a|s) of a policy by logits, with a row for the end."""
    rows = logits.double().softmax(1)
    return torch.cat([rows, torch.full_like(rows[:1], 1 / rows.shape[1])])
