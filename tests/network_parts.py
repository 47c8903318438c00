"""Recurrent, attending and unusual networks."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.utils.rnn import pack_padded_sequence

SAMPLES, INPUTS, OUTPUTS = 12, 4, 6
STEPS, WIDTH = 5, 4


class Recurrent(nn.Module):
    """A recurrent network over padded sequences; the last valid state goes on."""

    def __init__(self, kind: Callable[..., nn.RNNBase], **options: Any) -> None:
        super().__init__()
        self.memory = kind(WIDTH, 5, batch_first=True, **options)
        self.head = nn.Linear(5 * (1 + self.memory.bidirectional), OUTPUTS)

    def forward(self, sequence: Tensor, lengths: Tensor) -> Tensor:
        hidden, _ = self.memory(sequence)
        last: Tensor = hidden[torch.arange(len(hidden)), lengths - 1]
        result: Tensor = self.head(last)
        return result


class Packed(Recurrent):
    """The same over a packed sequence."""

    def forward(self, sequence: Tensor, lengths: Tensor) -> Tensor:
        packed = pack_padded_sequence(
            sequence, lengths.cpu(), batch_first=True, enforce_sorted=False
        )
        _, state = self.memory(packed)
        result: Tensor = self.head(state[0][-1] if isinstance(state, tuple) else state[-1])
        return result


class CellLoop(nn.Module):
    """An LSTM cell in a Python loop; padding keeps the state as it is."""

    def __init__(self) -> None:
        super().__init__()
        self.cell = nn.LSTMCell(WIDTH, 5)
        self.head = nn.Linear(5, OUTPUTS)

    def forward(self, sequence: Tensor, lengths: Tensor) -> Tensor:
        hidden = cell = sequence.new_zeros(len(sequence), 5)
        for step in range(sequence.shape[1]):
            new_hidden, new_cell = self.cell(sequence[:, step], (hidden, cell))
            valid = (step < lengths)[:, None]
            hidden, cell = (
                torch.where(valid, new_hidden, hidden),
                torch.where(valid, new_cell, cell),
            )
        result: Tensor = self.head(hidden)
        return result


def padding(lengths: Tensor) -> Tensor:
    """Return True where a sequence has ended, as attention modules have it."""
    return torch.arange(STEPS, device=lengths.device) >= lengths[:, None]


class ScaledDotProduct(nn.Module):
    """Scaled-dot-product attention by the bare function."""

    def __init__(self) -> None:
        super().__init__()
        self.project = nn.Linear(WIDTH, 3 * 8)
        self.head = nn.Linear(8, OUTPUTS)

    def forward(self, sequence: Tensor, lengths: Tensor) -> Tensor:
        queries, keys, values = (
            each.unflatten(-1, (2, 4)).transpose(1, 2)
            for each in self.project(sequence).chunk(3, -1)
        )
        mask = ~padding(lengths)[:, None, None, :]
        mixed = functional.scaled_dot_product_attention(queries, keys, values, attn_mask=mask)
        result: Tensor = self.head(mixed[:, :, 0].flatten(1))
        return result


class Attention(nn.Module):
    """nn.MultiheadAttention, without returned weights so that it takes its fused path."""

    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(WIDTH, 2, batch_first=True)
        self.head = nn.Linear(WIDTH, OUTPUTS)

    def forward(self, sequence: Tensor, lengths: Tensor) -> Tensor:
        mixed, _ = self.attention(
            sequence, sequence, sequence, key_padding_mask=padding(lengths), need_weights=False
        )
        result: Tensor = self.head(mixed[:, 0])
        return result


class Transformer(nn.Module):
    """nn.TransformerEncoder; the first token's features go on."""

    def __init__(self, dropout: float = 0.0) -> None:
        super().__init__()
        layer = nn.TransformerEncoderLayer(WIDTH, 2, 8, dropout=dropout, batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=True)
        self.head = nn.Linear(WIDTH, OUTPUTS)

    def forward(self, sequence: Tensor, lengths: Tensor) -> Tensor:
        mixed = self.encoder(sequence, src_key_padding_mask=padding(lengths))
        result: Tensor = self.head(mixed[:, 0])
        return result


class LowRank(nn.Module):
    """A frozen base with a trained update of rank 2."""

    def __init__(self) -> None:
        super().__init__()
        self.base = nn.Linear(8, 8).requires_grad_(False)
        self.down = nn.Linear(8, 2, bias=False)
        self.up = nn.Linear(2, 8, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.base(x) + self.up(self.down(x))
        return result


class Tied(nn.Module):
    """One layer used twice."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.inner(torch.tanh(self.inner(x)))
        return result


class ActorCritic(nn.Module):
    """A trunk with two heads; the critic's is not part of the policy."""

    def __init__(self) -> None:
        super().__init__()
        self.trunk = nn.Sequential(nn.Linear(INPUTS, 8), nn.Tanh())
        self.critic = nn.Linear(8, 1)
        self.actor = nn.Linear(8, OUTPUTS)

    def forward(self, x: Tensor) -> Tensor:
        features = self.trunk(x)
        self.critic(features)
        result: Tensor = self.actor(features)
        return result


class ManyInputs(nn.Module):
    """A picture, a vector and a token at once."""

    def __init__(self) -> None:
        super().__init__()
        self.image = nn.Sequential(nn.Conv2d(1, 2, 3), nn.Tanh(), nn.Flatten())
        self.vector = nn.Linear(INPUTS, 8)
        self.token = nn.Embedding(5, 8)
        self.head = nn.Linear(8 + 8 + 8, OUTPUTS)

    def forward(self, image: Tensor, vector: Tensor, token: Tensor) -> Tensor:
        features = [self.image(image), self.vector(vector), self.token(token)]
        result: Tensor = self.head(torch.tanh(torch.cat(features, -1)))
        return result
