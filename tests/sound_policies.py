"""Policies with nothing wrong, that a check may take for a fault."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.distributions as td
from torch import Tensor, nn
from torch.distributions import Categorical, Independent, Normal, TanhTransform
from torch.nn.functional import softplus
from torchrl_like import Composite, OneHot

OBSERVATIONS, ROWS = 5, 64


class Made(nn.Module):
    """A small network and two free parameters, made into distributions by a function of these."""

    def __init__(self, make: Callable[[Tensor, Tensor, Tensor], Any]) -> None:
        super().__init__()
        self.network = nn.Sequential(nn.Linear(OBSERVATIONS, 16), nn.Tanh(), nn.Linear(16, 4))
        self.free = nn.Parameter(torch.tensor([0.1, -0.2]))
        self.make = make

    def forward(self, observations: Tensor) -> Any:
        return self.make(self.network(observations), self.free, observations)


def joint(dist: td.Distribution) -> Any:
    return Independent(dist, 1)


def squashed(x: Tensor, free: Tensor, deviation: float, **cache: int) -> Any:
    return td.TransformedDistribution(
        joint(Normal(x[:, :2], deviation * free.exp())), [TanhTransform(**cache)]
    )


MADE: dict[str, Callable[[Tensor, Tensor, Tensor], Any]] = {
    "a mask computed from observations": lambda x, _, seen: Categorical(
        logits=x.masked_fill(~allowed(seen), -torch.inf)
    ),
    "a finite mask from observations": lambda x, _, seen: Categorical(
        logits=torch.where(allowed(seen), x, -1e9)
    ),
    "a mask in a dict of parts": lambda x, free, seen: {
        "button": Categorical(logits=x.masked_fill(~allowed(seen), -torch.inf)),
        "stick": joint(Normal(x[:, :2], free.exp())),
    },
    "tanh, deviation 3": lambda x, free, _: squashed(x, free, 3.0),
    "tanh, deviation 10": lambda x, free, _: squashed(x, free, 10.0),
    "tanh, deviation 3, with a cache": lambda x, free, _: squashed(x, free, 3.0, cache_size=1),
    "angles": lambda x, free, _: joint(td.VonMises(x[:, :2], free.exp())),
    "an angle": lambda x, _, seen: td.VonMises(3 * x[:, 0], softplus(x[:, 1]) + 0.5),
    "the same everywhere": lambda x, free, seen: Categorical(
        logits=free.expand(len(seen), 2) + 0 * x[:, :2]
    ),
    "small logits, all positive": lambda x, *_: Categorical(logits=0.25 + 0.01 * x),
    "small positive logits of coins": lambda x, *_: joint(td.Bernoulli(logits=0.3 + 0.01 * x)),
    "probabilities": lambda x, *_: Categorical(probs=x.softmax(-1)),
    "log-probabilities": lambda x, *_: Categorical(logits=x.log_softmax(-1)),
    "logarithms of probabilities": lambda x, *_: Categorical(logits=x.softmax(-1).log()),
    "a temperature": lambda x, free, _: Categorical(logits=x / free[0].exp()),
    "bounded logits": lambda x, *_: Categorical(logits=10 * x.tanh()),
    "a clamp that bites at some rows": lambda x, *_: joint(
        Normal(x[:, :2], x[:, 2:].clamp(-0.1, 0.1).exp())
    ),
    "a clamp within its bounds": lambda x, free, _: joint(
        Normal(x[:, :2], free.clamp(-5, 2).exp())
    ),
    "a square for a scale": lambda x, free, _: joint(Normal(x[:, :2], (1 + free).square())),
    "an absolute value for a scale": lambda x, *_: joint(Normal(x[:, :2], x[:, 2:].abs() + 0.1)),
    "a softplus for a scale": lambda x, *_: joint(Normal(x[:, :2], softplus(x[:, 2:]) + 1e-3)),
    "a sigmoid for a scale": lambda x, *_: joint(Normal(x[:, :2], 2 * x[:, 2:].sigmoid())),
    "ELU and one for a scale": lambda x, *_: joint(
        Normal(x[:, :2], 1.001 + nn.functional.elu(x[:, 2:]))
    ),
    "a scale that is not learned": lambda x, *_: joint(Normal(x[:, :2], 0.5)),
    "concentrations above one": lambda x, *_: joint(
        td.Beta(1 + softplus(x[:, :2]), 1 + softplus(x[:, 2:]))
    ),
    "a Cholesky factor": lambda x, free, _: td.MultivariateNormal(
        x[:, :2], scale_tril=torch.diag_embed(free.exp()).expand(len(x), 2, 2)
    ),
    "a positive observation's logarithm": lambda x, *_: Categorical(logits=x),
    "one-hot actions": lambda x, *_: OneHot(x),
    "named parts that are one": lambda x, free, _: Composite(
        len(x), {"stick": Normal(x[:, :2], free.exp()), ("hand", "button"): OneHot(x[:, 2:])}
    ),
    "two rows of one transform, made anew": lambda x, free, _: td.TransformedDistribution(
        joint(Normal(x[:, :2], free.exp())),
        [td.transforms.CatTransform([TanhTransform(), td.transforms.ExpTransform()], dim=-1)],
    ),
}


def allowed(seen: Tensor) -> Tensor:
    """Return which actions are, at least one wherever observations are real."""
    return seen[:, :4] > -0.5


def observations() -> Tensor:
    """Return observations of which each allows an action."""
    seen = torch.randn(ROWS, OBSERVATIONS)
    seen[torch.arange(ROWS), torch.randint(4, (ROWS,))] = 0.7
    return seen


class Keeping(Made):
    """Keeps the last features for a critic, and counts its calls."""

    def __init__(self) -> None:
        super().__init__(MADE["a temperature"])
        self.last: Tensor | None = None
        self.calls, self.shapes = 0, dict[torch.Size, int]()

    def forward(self, observations: Tensor) -> Any:
        self.last = self.network(observations)
        self.calls += 1
        self.shapes[observations.shape] = self.shapes.get(observations.shape, 0) + 1
        return self.make(self.last, self.free, observations)


class Tabled(Made):
    """Keeps a table that depends on the number of rows alone, and forgets features at each call."""

    def __init__(self) -> None:
        super().__init__(MADE["a temperature"])
        self.tables: dict[int, Tensor] = {}

    def forward(self, observations: Tensor) -> Any:
        rows = len(observations)
        if rows not in self.tables:
            self.tables[rows] = torch.zeros(rows, 1)
        return super().forward(observations + self.tables[rows].to(observations))


class Normalising(Made):
    """Standardises by statistics that the training loop updates, kept as plain tensors."""

    def __init__(self) -> None:
        super().__init__(MADE["a softplus for a scale"])
        self.mean, self.deviation = torch.zeros(OBSERVATIONS), torch.ones(OBSERVATIONS)

    def forward(self, observations: Tensor) -> Any:
        return super().forward((observations - self.mean) / self.deviation)


class PositiveLogarithm(Made):
    """Takes the logarithm of observations that are positive."""

    def __init__(self) -> None:
        super().__init__(MADE["a positive observation's logarithm"])

    def forward(self, observations: Tensor) -> Any:
        return super().forward(observations.log())


class InSinglePrecision(nn.Module):
    """RMSNorm as language models have it: it computes in float32, whatever it is given."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, x: Tensor) -> Tensor:
        wide = x.to(torch.float32)
        wide = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + 1e-6)
        return self.weight * wide.to(x.dtype)


class Block(nn.Module):
    """Attention and a gated layer, as Llama and Qwen have them."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.before, self.between = InSinglePrecision(width), InSinglePrecision(width)
        self.mixed = nn.Linear(width, 3 * width, bias=False)
        self.gate, self.up = (nn.Linear(width, 2 * width, bias=False) for _ in range(2))
        self.down = nn.Linear(2 * width, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        query, key, value = self.mixed(self.before(x)).chunk(3, -1)
        scores = query @ key.mT / math.sqrt(x.shape[-1])
        later = torch.ones(scores.shape[-2:], dtype=torch.bool).triu(1)
        scores = scores.masked_fill(later, -torch.inf)
        x = x + scores.softmax(-1, dtype=torch.float32).to(x.dtype) @ value
        hidden = self.between(x)
        result: Tensor = x + self.down(nn.functional.silu(self.gate(hidden)) * self.up(hidden))
        return result


class LanguageModel(nn.Module):
    """Logits of every next token, (N, T, V), or of the last alone."""

    def __init__(self, *, last: bool, words: int = 11, width: int = 16) -> None:
        super().__init__()
        self.embedding = nn.Embedding(words, width)
        self.blocks = nn.Sequential(Block(width), Block(width), InSinglePrecision(width))
        self.head, self.last = nn.Linear(width, words, bias=False), last

    def forward(self, tokens: Tensor) -> Categorical:
        logits = self.head(self.blocks(self.embedding(tokens)))
        return Categorical(logits=logits[:, -1] if self.last else logits)
