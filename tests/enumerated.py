"""All trajectories of a small process, as a batch of which one knows the exact expectation."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import product
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.distributions import Categorical

from trpo_optim.rollouts import Cursor, SinglePathBatch
from trpo_optim.theory import TabularMDP

STEPS, PLACES, ACTIONS, GAMMA = 4, 2, 2, 0.9
STATES = STEPS * PLACES
"""A state is a place at a time, and the last one, STATES, is the end."""


def layered(seed: int) -> TabularMDP:
    """Return a random process whose episodes end after STEPS steps."""
    noise = torch.Generator().manual_seed(seed)
    transitions = torch.zeros(STATES + 1, ACTIONS, STATES + 1, dtype=torch.float64)
    transitions[-PLACES - 1 :, :, STATES] = 1.0
    for state in range(STATES - PLACES):
        later = (state // PLACES + 1) * PLACES
        shares = torch.randn(ACTIONS, PLACES, generator=noise).double().softmax(1)
        transitions[state, :, later : later + PLACES] = shares
    rewards = torch.randn(STATES + 1, ACTIONS, generator=noise).double()
    rewards[STATES] = 0.0
    start = torch.zeros(STATES + 1, dtype=torch.float64)
    start[:PLACES] = torch.tensor([0.3, 0.7])
    return TabularMDP(transitions, rewards, start, GAMMA)


def random_logits(seed: int) -> Tensor:
    """Return logits of a policy, (STATES + 1, ACTIONS)."""
    noise = torch.Generator().manual_seed(seed)
    return torch.randn(STATES + 1, ACTIONS, generator=noise, dtype=torch.float64)


def exact_gradient(mdp: TabularMDP, logits: Tensor) -> Tensor:
    """Return the gradient of the expected return in a policy's logits, by central differences."""
    gradient, step = torch.zeros_like(logits), 1e-5
    for state, action in product(range(STATES), range(ACTIONS)):
        moved = torch.zeros_like(logits)
        moved[state, action] = step
        rise = mdp.expected_return((logits + moved).softmax(1))
        fall = mdp.expected_return((logits - moved).softmax(1))
        gradient[state, action] = (rise - fall) / (2 * step)
    return gradient


@dataclass
class Enumeration:
    """Every trajectory that a behaviour policy may take, side by side, and its probability.

    Attributes:
        batch: T steps of as many environments as there are trajectories.
        shares: The probability of each trajectory, shape (N,).
    """

    batch: SinglePathBatch
    shares: Tensor

    def weights(self) -> Tensor:
        """Return weights that make a mean over rows the expected discounted sum over time."""
        discounts = GAMMA ** torch.arange(STEPS, dtype=torch.float64)[:, None]
        return discounts * self.shares * self.batch.rewards.numel()


def enumeration(mdp: TabularMDP, behaviour: Tensor) -> Enumeration:
    """Return all trajectories of a policy by logits."""
    policy = behaviour.softmax(1)
    rows, shares = [], []
    for taken in product(range(ACTIONS), repeat=STEPS):
        for places in product(range(PLACES), repeat=STEPS):
            visited = [time * PLACES + place for time, place in enumerate(places)]
            share = mdp.start[visited[0]]
            for time, (state, action) in enumerate(zip(visited, taken, strict=True)):
                share = share * policy[state, action]
                if time + 1 < STEPS:
                    share = share * mdp.transitions[state, action, visited[time + 1]]
            rows.append((visited, taken))
            shares.append(share)
    states, actions = (torch.tensor(each).T for each in zip(*rows, strict=True))
    nothing = torch.zeros(states.shape, dtype=torch.bool)
    starts, terminated = nothing.clone(), nothing.clone()
    starts[0], terminated[-1] = True, True
    batch = SinglePathBatch(
        observations=states,
        actions=actions,
        rewards=mdp.rewards[states, actions],
        terminated=terminated,
        truncated=nothing,
        starts=starts,
        valid=~nothing,
        cut_observations=states[0, :0],
        cut_rows=torch.zeros(0, 2, dtype=torch.long),
        state=None,
        episode_returns=[],
        episode_lengths=[],
        end=Cursor(None, None, *map(np.zeros, [len(shares)] * 4)),
        log_prob=behaviour.log_softmax(1)[states, actions],
    )
    return Enumeration(batch, torch.stack(shares))


def by_logits(logits: Tensor) -> Any:
    """Return the policy that has these logits."""
    return lambda states: Categorical(logits=logits[states])
