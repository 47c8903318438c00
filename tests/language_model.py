"""A small language model and a rollout: prompts, responses of several lengths, padding."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

VOCABULARY, WIDTH, LENGTH, PROMPT, ROWS = 8, 6, 9, 3, 10


class LanguageModel(nn.Module):
    """One layer of causal attention, a feed-forward layer and a head, in float64."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(VOCABULARY, WIDTH)
        self.position = nn.Parameter(torch.randn(LENGTH, WIDTH))
        self.attention = nn.Linear(WIDTH, 3 * WIDTH)
        self.feed_forward = nn.Sequential(nn.LayerNorm(WIDTH), nn.Linear(WIDTH, WIDTH), nn.GELU())
        self.head = nn.Linear(WIDTH, VOCABULARY)
        self.double()

    def hidden(self, tokens: Tensor) -> Tensor:
        """Return (N, T, H)."""
        seen = self.embedding(tokens) + self.position[: tokens.shape[1]]
        query, key, value = self.attention(seen).chunk(3, -1)
        scores = query @ key.mT / math.sqrt(WIDTH)
        later = torch.ones(scores.shape[-2:], dtype=torch.bool).triu(1)
        seen = seen + scores.masked_fill(later, -math.inf).softmax(-1) @ value
        result: Tensor = seen + self.feed_forward(seen)
        return result

    def forward(self, tokens: Tensor) -> Tensor:
        result: Tensor = self.head(self.hidden(tokens))
        return result


@dataclass
class Rollout:
    """Sequences that a model drew. The sixth has no token that counts.

    Attributes:
        whole: Prompts and responses, (N, T + 1).
        mask: Which of ``tokens`` are of a response, (N, T).
        advantages: One per sequence, (N,).
    """

    model: LanguageModel = field(init=False)
    whole: Tensor = field(init=False)
    mask: Tensor = field(init=False)
    advantages: Tensor = field(init=False)

    def __post_init__(self) -> None:
        """Draw the batch."""
        torch.manual_seed(0)
        self.model = LanguageModel()
        self.whole = torch.randint(VOCABULARY, (ROWS, LENGTH))
        with torch.no_grad():
            for place in range(PROMPT, LENGTH):
                logits = self.model(self.whole[:, :place])[:, -1]
                self.whole[:, place] = logits.softmax(-1).multinomial(1).squeeze(-1)
        places = torch.arange(1, LENGTH)
        ends = torch.randint(PROMPT + 1, LENGTH + 1, (ROWS, 1))
        self.mask = (places >= PROMPT) & (places < ends)
        self.mask[5] = False
        self.advantages = torch.randn(ROWS, dtype=torch.float64)

    @property
    def tokens(self) -> Tensor:
        """The tokens that are predicted, (N, T)."""
        return self.whole[:, 1:]

    @property
    def parameters(self) -> list[nn.Parameter]:
        return list(self.model.parameters())

    def logits(self, rows: Any = slice(None)) -> Tensor:
        """Return what predicts ``tokens[rows]``, (n, T, V)."""
        result: Tensor = self.model(self.whole[rows][:, :-1])
        return result

    def logs(self, temperature: float = 1.0) -> Tensor:
        """Return the log-probabilities of the vocabulary, (N, T, V), by torch's log-softmax."""
        return (self.logits() / temperature).log_softmax(-1)

    def log_prob(self, temperature: float = 1.0) -> Tensor:
        """Return the log-probabilities of the tokens, (N, T)."""
        return self.logs(temperature).gather(-1, self.tokens[..., None]).squeeze(-1)

    def mean(self, values: Tensor, per: str) -> Tensor:
        """Return a mean over tokens, or over sequences of the sums over their tokens."""
        counted = self.mask.sum() if per == "token" else self.mask.any(1).sum()
        return torch.where(self.mask, values, 0).sum() / counted

    def move(self, by: float = 0.05) -> None:
        """Move the parameters at random."""
        noise = torch.Generator().manual_seed(1)
        with torch.no_grad():
            for each in self.parameters:
                each.add_(by * torch.randn(each.shape, generator=noise, dtype=each.dtype))


def evaluated(closure: Callable[[], Any]) -> tuple[Tensor, Tensor, Tensor]:
    """Return loss, mean KL and third value."""
    loss, kl, third = closure()
    return loss, kl.mean(), third


def derivatives(value: Tensor, parameters: Sequence[Tensor]) -> Tensor:
    """Return a value and its gradient as one vector."""
    slopes = torch.autograd.grad(value, parameters, retain_graph=True)
    return torch.cat([value.detach().reshape(1), *(each.flatten() for each in slopes)])


def both(rollout: Rollout, closure: Callable[[], Any]) -> tuple[Tensor, Tensor]:
    """Return loss and mean KL of a closure, each with its gradient."""
    loss, kl, _ = (*closure(), None)[:3]
    return derivatives(loss, rollout.parameters), derivatives(kl.mean(), rollout.parameters)


def kept_elements(evaluate: Callable[[], Any]) -> int:
    """Return the largest number of elements of a tensor that the graph of a call keeps."""
    sizes = []

    def pack(tensor: Tensor) -> Tensor:
        sizes.append(tensor.numel())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda each: each):
        evaluate()
    return max(sizes)
