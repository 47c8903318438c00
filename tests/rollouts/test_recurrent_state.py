"""A recurrent state reaches the policy in the form that the policy gave it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import gymnasium as gym
import pytest
import torch
from torch import Tensor, nn
from torch.distributions import Categorical

from trpo_optim import TrustRegionError, TrustRegionOptimizer
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


class Packing(nn.Module):
    """The same policy with its state in another form, from and to which it is brought."""

    def __init__(self, pack: Callable[[Memory], Any], unpack: Callable[[Any], Memory]) -> None:
        super().__init__()
        self.inner, self.pack, self.unpack = Recurrent(), pack, unpack

    def forward(self, seen: Tensor, state: Any, starts: Tensor) -> tuple[Categorical, Any]:
        dist, after = self.inner(seen, self.unpack(state), starts)
        return dist, self.pack(after)


FORMS: dict[str, tuple[Callable[[Memory], Any], Callable[[Any], Memory]]] = {
    "a named tuple": (lambda memory: memory, lambda state: state),
    "a tuple": (tuple, lambda state: Memory(*state)),
    "a list": (list, lambda state: Memory(*state)),
    "a dict": (lambda memory: memory._asdict(), lambda state: Memory(**state)),
    "nested": (
        lambda memory: {"all": (memory, [memory.cell])},
        lambda state: Memory(state["all"][0].hidden, state["all"][1][0]),
    ),
}


@pytest.mark.parametrize("form", FORMS)
def test_a_state_comes_back_in_the_form_that_it_was_given(form: str) -> None:
    torch.manual_seed(0)
    envs = gym.make_vec("CartPole-v1", 4, vectorization_mode="sync")
    policy = Packing(*FORMS[form])
    start = policy.pack(Memory(torch.zeros(1, 4, 8), torch.zeros(1, 4, 8)))
    first = single_path(envs, policy, steps=16, state=start, seed=0)
    batch = single_path(envs, policy, steps=16, after=first)
    assert type(batch.state) is type(start)
    with torch.no_grad():
        _, expected = policy(first.observations, first.state, first.starts)
    for found, wanted in zip(*map(policy.unpack, (batch.state, expected)), strict=True):
        torch.testing.assert_close(found, wanted)
    closures = policy_closure(policy, batch, torch.randn(16, 4), micro_batch=2)
    assert TrustRegionOptimizer(policy.parameters()).step(closures).accepted


@dataclass
class Cell:
    """A state of a form that is not taken apart."""

    hidden: Tensor


@pytest.mark.parametrize("state", [Cell(torch.zeros(1, 4, 8)), (torch.zeros(1, 4, 8), None)])
def test_a_state_of_another_form_is_refused(state: Any) -> None:
    envs = gym.make_vec("CartPole-v1", 4, vectorization_mode="sync")
    with pytest.raises(TrustRegionError, match=r"state holds a (Cell|NoneType); it must be a ten"):
        single_path(envs, Recurrent(), steps=1, state=state)


class InPlace(Recurrent):
    """Its next state is the same memory each time."""

    def __init__(self) -> None:
        super().__init__()
        self.kept = Memory(torch.zeros(1, 4, 8), torch.zeros(1, 4, 8))

    @torch.no_grad()
    def forward(self, seen: Tensor, state: Memory, starts: Tensor) -> tuple[Categorical, Memory]:
        dist, after = super().forward(seen, state, starts)
        for memory, value in zip(self.kept, after, strict=True):
            memory.copy_(value)
        return dist, self.kept


def test_a_policy_may_return_its_state_in_the_same_memory_each_time() -> None:
    torch.manual_seed(0)
    envs, policy = gym.make_vec("CartPole-v1", 4, vectorization_mode="sync"), InPlace()
    start = Memory(torch.zeros(1, 4, 8), torch.zeros(1, 4, 8))
    first = single_path(envs, policy, steps=5, state=start, seed=0)
    assert first.end is not None
    ending = [each.clone() for each in first.end.state]
    batch = single_path(envs, policy, steps=5, after=first)
    for kept in (batch.state, first.end.state):
        for found, wanted in zip(kept, ending, strict=True):
            assert torch.equal(found, wanted)
    torch.testing.assert_close(batch.log_ratios(policy), torch.zeros(5, 4), rtol=0, atol=1e-6)
