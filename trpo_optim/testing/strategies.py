"""Hypothesis strategies: observations, and small sound policies to compare one's own with."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from hypothesis import strategies
from hypothesis.strategies import SearchStrategy
from torch import Tensor, nn
from torch.distributions import (
    Beta,
    Categorical,
    Independent,
    MultivariateNormal,
    Normal,
    TanhTransform,
    TransformedDistribution,
)
from torch.nn.functional import softplus

__all__ = ["SmallPolicy", "observations", "policies"]

_Make = Callable[[Tensor, Tensor], Any]
"""From outputs (N, 4) and free parameters (2,) to a policy's distributions."""

_FAMILIES: dict[str, _Make] = {
    "categorical": lambda x, _: Categorical(logits=x),
    "masked": lambda x, _: Categorical(
        logits=x.masked_fill(torch.arange(4, device=x.device) == 1, -torch.inf)
    ),
    "gaussian": lambda x, free: Independent(Normal(x[:, :2], free.exp()), 1),
    "gaussian, own scale": lambda x, _: Independent(Normal(x[:, :2], softplus(x[:, 2:]) + 0.1), 1),
    "squashed": lambda x, free: TransformedDistribution(
        Independent(Normal(x[:, :2], 0.5 * free.exp()), 1), [TanhTransform()]
    ),
    "beta": lambda x, _: Independent(Beta(1 + softplus(x[:, :2]), 1 + softplus(x[:, 2:])), 1),
    "multivariate": lambda x, free: MultivariateNormal(
        x[:, :2], scale_tril=torch.diag_embed(free.exp()).expand(len(x), 2, 2)
    ),
    "tuple": lambda x, _: (Categorical(logits=x[:, :2]), Categorical(logits=x[:, 2:])),
    "dict": lambda x, free: {
        "button": Categorical(logits=x[:, :2]),
        "stick": Independent(Normal(x[:, 2:], free.exp()), 1),
    },
}


class SmallPolicy(nn.Module):
    """An MLP of one hidden layer with any family of distributions.

    Args:
        inputs: Features of an observation.
        hidden: Width of the hidden layer.
        family: One of ``families``.
        seed: Of the weights; the global random state stays where it is.
    """

    families = tuple(_FAMILIES)

    def __init__(self, inputs: int, hidden: int, family: str, seed: int = 0) -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            self.network = nn.Sequential(nn.Linear(inputs, hidden), nn.Tanh(), nn.Linear(hidden, 4))
        self.free = nn.Parameter(torch.tensor([-0.3, 0.1]))
        self.family = family

    def forward(self, observations: Tensor) -> Any:
        """Return the distributions at observations of shape (N, inputs)."""
        return _FAMILIES[self.family](self.network(observations), self.free)

    def extra_repr(self) -> str:
        """Return the family, for Hypothesis to show."""
        return f"family={self.family!r}"


def observations(rows: int = 128, features: int = 4) -> SearchStrategy[Tensor]:
    """Draw Gaussian observations of a random scale.

    Args:
        rows: The batch.
        features: Numbers per observation.

    Returns:
        A strategy for tensors of shape (rows, features).
    """

    def drawn(seed: int, scale: float) -> Tensor:
        generator = torch.Generator("cpu").manual_seed(seed)
        return scale * torch.randn(rows, features, generator=generator, device="cpu")

    seeds = strategies.integers(0, 2**31 - 1)
    return strategies.builds(drawn, seeds, strategies.floats(0.1, 2.0))


def policies(features: int = 4) -> SearchStrategy[SmallPolicy]:
    """Draw small sound policies of every family.

    Args:
        features: Numbers per observation.

    Returns:
        A strategy for modules.
    """
    return strategies.builds(
        SmallPolicy,
        strategies.just(features),
        strategies.integers(2, 16),
        strategies.sampled_from(SmallPolicy.families),
        strategies.integers(0, 2**31 - 1),
    )
