"""Policies over sequences, learned from scratch: far above chance, within every radius."""

from __future__ import annotations

import agent
import pytest
import torch
from learner import (
    Bandit,
    Learner,
    categorical_kl,
)
from torch import Tensor, nn
from torch.distributions import (
    Categorical,
    Distribution,
)
from torch.nn.functional import one_hot
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

pytestmark = pytest.mark.learns

SEED = 0
SYMBOLS, STEPS = 4, 8


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(SEED)


def show_symbols(rows: int) -> tuple[Tensor, Tensor]:
    """Return sequences of 3 to 8 steps, of which only the first shows the symbol; and the symbols.

    The last channel is 1 up to the sequence's end; then all are 0.
    """
    symbols = torch.randint(SYMBOLS, (rows,))
    observations = 0.3 * torch.randn(rows, STEPS, SYMBOLS + 1)
    observations[:, 0, :SYMBOLS] = one_hot(symbols, SYMBOLS).float()
    observations[..., -1] = 1
    going_on = torch.arange(STEPS) < torch.randint(3, STEPS + 1, (rows, 1))
    return observations * going_on.unsqueeze(-1), symbols


def valid(observations: Tensor) -> Tensor:
    return observations[..., -1] == 1


def at_end(sequence: Tensor, observations: Tensor) -> Tensor:
    """Return each row's element at its last valid step."""
    return sequence[torch.arange(len(sequence)), valid(observations).sum(1) - 1]


class LSTMPolicy(nn.Module):
    """Acts after the last step, or after every one."""

    def __init__(self, *, every_step: bool) -> None:
        super().__init__()
        self.every_step = every_step
        self.lstm = nn.LSTM(SYMBOLS + 1, 32, batch_first=True)
        self.head = nn.Linear(32, SYMBOLS)

    def forward(self, observations: Tensor) -> Distribution:
        lengths = valid(observations).sum(1)
        packed = pack_padded_sequence(observations, lengths, batch_first=True, enforce_sorted=False)
        outputs, (last, _) = self.lstm(packed)
        if self.every_step:
            padded, _ = pad_packed_sequence(outputs, batch_first=True, total_length=STEPS)
            return Categorical(logits=self.head(padded))
        return Categorical(logits=self.head(last[0]))


class AttentionPolicy(nn.Module):
    """Acts after the last step."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Linear(SYMBOLS + 1, 16)
        self.position = nn.Parameter(0.1 * torch.randn(STEPS, 16))
        layer = nn.TransformerEncoderLayer(
            16, nhead=2, dim_feedforward=32, dropout=0, batch_first=True
        )
        self.encoder = nn.TransformerEncoder(layer, num_layers=1)
        self.head = nn.Linear(16, SYMBOLS)

    def forward(self, observations: Tensor) -> Distribution:
        embedded = self.embedding(observations) + self.position
        encoded = self.encoder(embedded, src_key_padding_mask=~valid(observations))
        return Categorical(logits=self.head(at_end(encoded, observations)))


class MemorylessPolicy(nn.Module):
    """Acts after the last step on that alone."""

    def __init__(self) -> None:
        super().__init__()
        self.network = agent.mlp(SYMBOLS + 1, 32, SYMBOLS, gain=0.01)

    def forward(self, observations: Tensor) -> Distribution:
        return Categorical(logits=self.network(at_end(observations, observations)))


RECALL = Bandit(show_symbols, lambda actions, symbols: (actions == symbols).float())


def test_an_lstm_recalls_the_first_symbol_of_a_sequence() -> None:
    learner = Learner(LSTMPolicy(every_step=False), categorical_kl, max_kl=0.06)
    assert RECALL.learn(learner, updates=16, rows=384) > 0.9  # chance: 0.25


def test_an_lstm_that_acts_at_every_step_learns_on_padded_sequences() -> None:
    task = Bandit(
        show_symbols, lambda actions, symbols: (actions == symbols[:, None]).float(), mask=valid
    )
    learner = Learner(LSTMPolicy(every_step=True), categorical_kl, max_kl=0.06)
    assert task.learn(learner, updates=12, rows=256) > 0.9  # chance: 0.25


def test_attention_recalls_the_first_symbol_of_a_sequence() -> None:
    learner = Learner(AttentionPolicy(), categorical_kl, max_kl=0.06)
    assert RECALL.learn(learner, updates=15, rows=384) > 0.9  # chance: 0.25


def test_without_memory_the_first_symbol_is_never_recalled() -> None:
    learner = Learner(MemorylessPolicy(), categorical_kl)
    assert RECALL.learn(learner, updates=40) < 0.4  # chance: 0.25
