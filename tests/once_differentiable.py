"""Networks that torch differentiates once, but not twice."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from networks import INPUTS, OUTPUTS, SAMPLES, Checkpointed, Network, around
from torch import Tensor, nn
from torch.autograd import Function
from torch.autograd.function import once_differentiable
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.checkpoint import checkpoint


class Bag(nn.Module):
    """Nothing but a bag of embeddings."""

    def __init__(self) -> None:
        super().__init__()
        self.bag = nn.EmbeddingBag(10, OUTPUTS)

    def forward(self, tokens: Tensor) -> Tensor:
        result: Tensor = self.bag(tokens)
        return result


class Flash(nn.Module):
    """Attention by a kernel that the closure insists on."""

    def __init__(self) -> None:
        super().__init__()
        self.project = nn.Linear(8, 8)
        self.head = nn.Linear(16, OUTPUTS)

    def forward(self, x: Tensor) -> Tensor:
        with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
            mixed = nn.functional.scaled_dot_product_attention(self.project(x), x, x)
        result: Tensor = self.head(mixed[:, :, 0].flatten(1))
        return result


class GridSample(nn.Module):
    """Looks at learned places of a picture."""

    def __init__(self) -> None:
        super().__init__()
        self.places = nn.Parameter(torch.linspace(-0.8, 0.7, 12).view(1, 2, 3, 2))
        self.head = nn.Linear(6, OUTPUTS)

    def forward(self, pictures: Tensor) -> Tensor:
        places = self.places.expand(len(pictures), -1, -1, -1)
        seen = nn.functional.grid_sample(pictures, places, align_corners=False)
        result: Tensor = self.head(seen.flatten(1))
        return result


class Distances(nn.Module):
    """Distances to learned centres."""

    def __init__(self) -> None:
        super().__init__()
        self.centres = nn.Parameter(torch.linspace(-1, 1, 5 * INPUTS).view(5, INPUTS).sin())
        self.head = nn.Linear(5, OUTPUTS)

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.head(torch.cdist(x, self.centres))
        return result


class Opaque(Function):
    """The hyperbolic tangent, with a backward outside of torch that nothing marks."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x.tanh()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        slope = 1 - np.tanh(x.detach().numpy()) ** 2
        return torch.from_numpy(grads[0].detach().numpy() * slope)


class Marked(Opaque):
    """The same, marked."""

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        return Opaque.backward(ctx, *grads)


class Layer(nn.Module):
    """A layer that calls a function."""

    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x)


class WholeCheckpoint(nn.Module):
    """All of a network in one reentrant checkpoint, so that the graph shows no parameter."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Sequential(nn.Linear(INPUTS, 8), nn.Tanh(), nn.Linear(8, OUTPUTS))
        self.reentrant = True

    def forward(self, x: Tensor) -> Tensor:
        seen = x.clone().requires_grad_()
        result: Tensor = checkpoint(self.inner, seen, use_reentrant=self.reentrant)
        return result


ONCE_DIFFERENTIABLE: dict[str, tuple[Callable[[], Network], str]] = {
    "EmbeddingBag": (
        lambda: Network(Bag(), torch.arange(2 * SAMPLES).view(-1, 2) % 10),
        "_embedding_bag",
    ),
    "flash attention": (
        lambda: Network(Flash(), torch.randn(SAMPLES, 2, 5, 8)),
        "attention",
    ),
    "grid_sample": (
        lambda: Network(GridSample(), torch.randn(SAMPLES, 1, 6, 6)),
        "",
    ),
    "cdist": (lambda: Network(Distances(), torch.randn(SAMPLES, INPUTS)), ""),
    "checkpoint, reentrant": (lambda: around(Checkpointed(reentrant=True)), "use_reentrant"),
    "checkpoint of all, reentrant": (
        lambda: Network(WholeCheckpoint(), torch.randn(SAMPLES, INPUTS)),
        "use_reentrant",
    ),
    "once_differentiable": (lambda: around(Layer(Marked.apply)), "Marked is marked"),
    "backward outside of torch": (lambda: around(Layer(Opaque.apply)), "differs from the finite"),
}
"""By name: the network, and words of the reason that the report gives; empty: it may give none."""
