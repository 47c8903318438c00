"""A recurrent state reaches the policy in the form that the policy gave it."""

from __future__ import annotations

from typing import NamedTuple

import gymnasium as gym
import torch
from torch import Tensor, nn
from torch.distributions import Categorical

from trpo_optim import TrustRegionOptimizer
from trpo_optim.rollouts import policy_closure, single_path


class Memory(NamedTuple):
    """The state of an LSTM, both of shape (1, N, 8)."""

    hidden: Tensor
    cell: Tensor


class Recurrent(nn.Module):
    """An LSTM that starts anew with every episode."""

    def __init__(self) -> None:
        super().__init__()
        self.cell, self.head = nn.LSTMCell(4, 8), nn.Linear(8, 2)

    def forward(self, seen: Tensor, state: Memory, starts: Tensor) -> tuple[Categorical, Memory]:
        outputs = []
        for now, begins in zip(seen, starts, strict=True):
            kept = [each[0] * ~begins[:, None] for each in (state.hidden, state.cell)]
            hidden, cell = self.cell(now, kept)
            state = Memory(hidden[None], cell[None])
            outputs.append(self.head(hidden))
        return Categorical(logits=torch.stack(outputs)), state


def test_a_named_tuple_comes_back_as_one() -> None:
    torch.manual_seed(0)
    envs = gym.make_vec("CartPole-v1", 4, vectorization_mode="sync")
    policy, start = Recurrent(), Memory(torch.zeros(1, 4, 8), torch.zeros(1, 4, 8))
    first = single_path(envs, policy, steps=16, state=start, seed=0)
    batch = single_path(envs, policy, steps=16, after=first)
    assert isinstance(batch.state, Memory)
    closures = policy_closure(policy, batch, torch.randn(16, 4), micro_batch=2)
    assert TrustRegionOptimizer(policy.parameters()).step(closures).accepted
