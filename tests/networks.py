"""Every kind of network that a policy may be made of."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from network_parts import (
    INPUTS,
    OUTPUTS,
    SAMPLES,
    STEPS,
    WIDTH,
    ActorCritic,
    Attention,
    CellLoop,
    LowRank,
    ManyInputs,
    Packed,
    Recurrent,
    ScaledDotProduct,
    Tied,
    Transformer,
)
from torch import Tensor, nn
from torch.autograd import Function
from torch.nn.utils import parametrizations
from torch.utils.checkpoint import checkpoint

__all__ = [
    "INPUTS",
    "NETWORKS",
    "OUTPUTS",
    "SAMPLES",
    "Autocast",
    "Checkpointed",
    "Network",
    "Scale",
    "ScaleWithSetup",
    "Scaled",
    "around",
]


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
