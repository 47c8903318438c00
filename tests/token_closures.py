"""A small language model's batch: prompts, responses and padding, and closures on it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributions import Categorical, kl_divergence

ROWS, STEPS, WORDS = 12, 9, 5


class Model(nn.Module):
    """Logits of the next token by the last two."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.head = nn.Embedding(WORDS, 6), nn.Linear(6, WORDS)

    def forward(self, tokens: Tensor) -> Categorical:
        seen = self.embedding(tokens)
        return Categorical(logits=self.head((seen + seen.roll(1, 1)).tanh()))


@dataclass
class Tokens:
    """Responses of several lengths between prompts and padding.

    Attributes:
        mask: Which tokens are of a response, (N, T).
        advantages: One per sequence, (N,).
    """

    model: Model = field(init=False)
    tokens: Tensor = field(init=False)
    chosen: Tensor = field(init=False)
    mask: Tensor = field(init=False)
    advantages: Tensor = field(init=False)
    old: Any = field(init=False)

    def __post_init__(self) -> None:
        """Draw the batch."""
        torch.manual_seed(0)
        self.model = Model().double()
        self.tokens = torch.randint(WORDS, (ROWS, STEPS))
        places = torch.arange(STEPS)
        ends = torch.randint(5, STEPS, (ROWS, 1))
        self.mask = (places >= 3) & (places < ends)
        self.advantages = torch.randn(ROWS, dtype=torch.float64)
        with torch.no_grad():
            self.old = self.model(self.tokens)
        self.chosen = self.old.sample()

    def log_prob(self) -> Tensor:
        result: Tensor = self.model(self.tokens).log_prob(self.chosen)
        return result

    def options(self) -> dict[str, Any]:
        """Return what ``check_closure`` is told."""
        return {"log_prob": self.log_prob, "advantages": self.advantages, "mask": self.mask}

    def closure(
        self,
        loss: Callable[[Tensor], Tensor],
        kl: Callable[[Tensor], Tensor],
        *,
        third: bool = True,
    ) -> Callable[[], Any]:
        """Return a closure by how gains and KLs of tokens, (N, T), become one number."""

        def values() -> Any:
            new = self.model(self.tokens)
            ratio = (new.log_prob(self.chosen) - self.old.log_prob(self.chosen)).exp()
            pair = -loss(ratio * self.advantages[:, None]), kl(kl_divergence(self.old, new))
            return (*pair, new) if third else pair

        return values

    def parameters(self) -> list[nn.Parameter]:
        """Return the model's parameters."""
        return list(self.model.parameters())

    def of_tokens(self, values: Tensor) -> Tensor:
        """Return the mean over all tokens that count."""
        return values[self.mask].mean()

    def of_sequences(self, values: Tensor) -> Tensor:
        """Return the mean over sequences of their sums: each is one action."""
        return (values * self.mask).sum(1).mean()

    def of_means(self, values: Tensor) -> Tensor:
        """Return the mean over sequences of their means."""
        return ((values * self.mask).sum(1) / self.mask.sum(1)).mean()
