"""Every kind of network that a policy may have, small, with a batch of observations for it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import Function
from torch.nn import functional
from torch.nn.utils import parametrizations
from torch.nn.utils.rnn import pack_padded_sequence
from torch.utils.checkpoint import checkpoint

SAMPLES, INPUTS, OUTPUTS = 12, 4, 6
STEPS, WIDTH = 5, 4


class Network(nn.Module):
    """A module with observations of its own."""

    def __init__(self, body: nn.Module, *observations: Tensor) -> None:
        super().__init__()
        self.body = body
        self.observations = observations

    def seen(self) -> tuple[Tensor, ...]:
        """Return the observations where the parameters lie, in their precision."""
        like = next(self.parameters())
        return tuple(
            each.to(like) if each.is_floating_point() else each.to(like.device)
            for each in self.observations
        )

    def forward(self) -> Tensor:
        """Return the outputs, (SAMPLES, OUTPUTS)."""
        result: Tensor = self.body(*self.seen())
        return result


def flat() -> Tensor:
    return torch.randn(SAMPLES, INPUTS)


def sequences() -> Tensor:
    return torch.randn(SAMPLES, STEPS, WIDTH)


def lengths() -> Tensor:
    return torch.arange(SAMPLES) % STEPS + 1


def frames(size: int, channels: int = 4) -> Tensor:
    return torch.rand(SAMPLES, channels, size, size)


def around(layer: nn.Module) -> Network:
    """Return an MLP with a layer from 8 features to 8 in its middle."""
    return Network(
        nn.Sequential(nn.Linear(INPUTS, 8), layer, nn.Tanh(), nn.Linear(8, OUTPUTS)), flat()
    )


def atari() -> Network:
    """Return the network of Schulman et al. (2015): 16 and 16 filters, 20 units."""
    body = nn.Sequential(
        nn.Conv2d(4, 16, 4, stride=2),
        nn.ReLU(),
        nn.Conv2d(16, 16, 4, stride=2),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(16 * 9 * 9, 20),
        nn.ReLU(),
        nn.Linear(20, OUTPUTS),
    )
    return Network(body, frames(42))


def convolutional() -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(4, 6, 3), nn.Tanh(), nn.Conv2d(6, 3, 3), nn.Tanh(), nn.Flatten(),
        nn.Linear(27, OUTPUTS),
    )  # fmt: skip


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


class Checkpointed(nn.Module):
    """A layer that is evaluated again in backward."""

    def __init__(self, *, reentrant: bool, width: int = 8) -> None:
        super().__init__()
        self.inner = nn.Linear(width, width)
        self.reentrant = reentrant

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = checkpoint(self.inner, x, use_reentrant=self.reentrant)
        return result


class Scale(Function):
    """x * w, in the old style that torch.func refuses."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, w: Tensor) -> Tensor:
        ctx.save_for_backward(x, w)
        return x * w

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor]:
        x, w = ctx.saved_tensors
        return grads[0] * w, (grads[0] * x).sum(0)


class ScaleWithSetup(Scale):
    """x * w, in the style that torch.func takes."""

    @staticmethod
    def forward(x: Tensor, w: Tensor) -> Tensor:  # type: ignore[override]  # torch knows both forms
        return x * w

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.save_for_backward(*inputs)


class Scaled(nn.Module):
    """A layer whose parameter goes straight into an autograd.Function."""

    def __init__(self, function: type[Function], width: int = 8) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.full((width,), 0.7))
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.function.apply(x, self.weight)
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


class Autocast(nn.Module):
    """An MLP in bfloat16 under autocast."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Sequential(nn.Linear(INPUTS, 8), nn.Tanh(), nn.Linear(8, OUTPUTS))

    def forward(self, x: Tensor) -> Tensor:
        with torch.autocast(x.device.type, torch.bfloat16):
            output: Tensor = self.inner(x)
        return output.to(x.dtype)


def channels_last() -> Network:
    network = Network(convolutional(), frames(7))
    network.to(memory_format=torch.channels_last)  # type: ignore[call-overload]  # torch documents it
    return network


def compiled() -> Network:
    network = around(nn.Identity())
    network.body.compile(backend="aot_eager")
    return network


def shared() -> Network:
    network = around(nn.Identity())
    network.share_memory()
    return network


NETWORKS: dict[str, Callable[[], Network]] = {
    "MLP": lambda: around(nn.Identity()),
    "CNN": lambda: Network(convolutional(), frames(7)),
    "CNN, channels_last weights": channels_last,
    "the paper's Atari CNN": atari,
    "RNN": lambda: Network(Recurrent(nn.RNN), sequences(), lengths()),
    "GRU": lambda: Network(Recurrent(nn.GRU), sequences(), lengths()),
    "LSTM, padded": lambda: Network(Recurrent(nn.LSTM), sequences(), lengths()),
    "LSTM, two layers both ways": lambda: Network(
        Recurrent(nn.LSTM, num_layers=2, bidirectional=True), sequences(), lengths()
    ),
    "LSTM, packed": lambda: Network(Packed(nn.LSTM), sequences(), lengths()),
    "LSTMCell loop": lambda: Network(CellLoop(), sequences(), lengths()),
    "scaled_dot_product_attention": lambda: Network(ScaledDotProduct(), sequences(), lengths()),
    "MultiheadAttention": lambda: Network(Attention(), sequences(), lengths()),
    "MultiheadAttention, eval": lambda: Network(Attention().eval(), sequences(), lengths()),
    "TransformerEncoder, dropout": lambda: Network(Transformer(0.1), sequences(), lengths()),
    "TransformerEncoder, eval": lambda: Network(Transformer(0.1).eval(), sequences(), lengths()),
    "batch norm": lambda: around(nn.BatchNorm1d(8)),
    "batch norm, eval": lambda: around(nn.BatchNorm1d(8).eval()),
    "layer norm": lambda: around(nn.LayerNorm(8)),
    "group norm": lambda: around(nn.GroupNorm(2, 8)),
    "RMS norm": lambda: around(nn.RMSNorm(8)),
    "dropout": lambda: around(nn.Dropout(0.3)),
    "weight norm": lambda: around(parametrizations.weight_norm(nn.Linear(8, 8))),
    "spectral norm": lambda: around(parametrizations.spectral_norm(nn.Linear(8, 8))),
    "spectral norm, eval": lambda: around(parametrizations.spectral_norm(nn.Linear(8, 8)).eval()),
    "tied weights": lambda: around(Tied()),
    "torch.compile": compiled,
    "checkpoint, not reentrant": lambda: around(Checkpointed(reentrant=False)),
    "autograd.Function": lambda: around(Scaled(Scale)),
    "autograd.Function, setup_context": lambda: around(Scaled(ScaleWithSetup)),
    "frozen base, low-rank update": lambda: around(LowRank()),
    "actor and critic on one trunk": lambda: Network(ActorCritic(), flat()),
    "picture, vector and token": lambda: Network(
        ManyInputs(), frames(4, 1), flat(), torch.arange(SAMPLES) % 5
    ),
    "shared memory": shared,
}
