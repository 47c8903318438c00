"""Every family of distributions that a policy may have, from a network's outputs."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributions as td
from torch import Tensor
from torch.distributions import Distribution
from torch.nn import functional

Make = Callable[[Tensor, Tensor], Distribution]
"""From outputs (N, 6) and free parameters (3,) to a distribution."""


def positive(x: Tensor) -> Tensor:
    return functional.softplus(x) + 0.3


def triangular(x: Tensor) -> Tensor:
    lower = torch.diag_embed(positive(x[..., :2]))
    lower[..., 1, 0] = x[..., 2]
    return lower


SMOOTH: dict[str, Make] = {
    "normal, free scale": lambda x, free: td.Normal(x[:, :3], free.exp()),
    "normal, own scale": lambda x, free: td.Normal(x[:, :3], positive(x[:, 3:])),
    "normal, joint": lambda x, free: td.Independent(td.Normal(x[:, :3], free.exp()), 1),
    "normal, scale from the mean": lambda x, free: td.Normal(x[:, :3], positive(x[:, :3])),
    "squashed normal": lambda x, free: td.TransformedDistribution(
        td.Normal(x[:, :3], free.exp()), [td.TanhTransform()]
    ),
    "log-normal": lambda x, free: td.LogNormal(x[:, :3], positive(x[:, 3:])),
    "beta": lambda x, free: td.Beta(positive(x[:, :3]), positive(x[:, 3:])),
    "gamma": lambda x, free: td.Gamma(positive(x[:, :3]), positive(x[:, 3:])),
    "dirichlet": lambda x, free: td.Dirichlet(positive(x)),
    "exponential": lambda x, free: td.Exponential(positive(x)),
    "poisson": lambda x, free: td.Poisson(positive(x)),
    "bernoulli, logits": lambda x, free: td.Bernoulli(logits=x),
    "bernoulli, probabilities": lambda x, free: td.Bernoulli(probs=x.sigmoid()),
    "categorical, logits": lambda x, free: td.Categorical(logits=x),
    "categorical, probabilities": lambda x, free: td.Categorical(probs=positive(x)),
    "categorical, many": lambda x, free: td.Independent(
        td.Categorical(logits=x.view(len(x), 2, 3)), 1
    ),
    "one-hot": lambda x, free: td.OneHotCategorical(logits=x),
    "multivariate, scale": lambda x, free: td.MultivariateNormal(
        x[:, :2], scale_tril=triangular(x[:, 2:5])
    ),
    "multivariate, covariance": lambda x, free: td.MultivariateNormal(
        x[:, :2], triangular(x[:, 2:5]) @ triangular(x[:, 2:5]).mT
    ),
    "multivariate, precision": lambda x, free: td.MultivariateNormal(
        x[:, :2],
        precision_matrix=triangular(x[:, 2:5]) @ triangular(x[:, 2:5]).mT + torch.eye(2).to(x),
    ),
    "low rank": lambda x, free: td.LowRankMultivariateNormal(
        x[:, :2], x[:, 2:4, None], positive(x[:, 4:])
    ),
}


@dataclass(frozen=True)
class Family:
    """What makes a policy of the outputs, and how its KL is taken."""

    make: Callable[[Tensor, Tensor], Any]
    mask: Callable[[int], Tensor] | None = None
    sampled: bool = False


def joint(make: Make) -> Family:
    """Return a family whose last batch dimension, if there are two, belongs to the action."""

    def wrapped(x: Tensor, free: Tensor) -> Distribution:
        dist = make(x, free)
        return td.Independent(dist, 1) if len(dist.batch_shape) > 1 else dist

    return Family(wrapped)


def without_some(x: Tensor) -> Tensor:
    """Return logits of which two are masked out."""
    return x.masked_fill(torch.arange(x.shape[-1], device=x.device) % 3 == 1, -torch.inf)


def mixture(x: Tensor, free: Tensor) -> Distribution:
    parts = td.Independent(td.Normal(x[:, :4].view(-1, 2, 2), positive(free[:2])), 1)
    return td.MixtureSameFamily(td.Categorical(logits=x[:, 4:]), parts)


FAMILIES: dict[str, Family] = {
    "Categorical": joint(SMOOTH["categorical, logits"]),
    "Categorical, masked": Family(lambda x, free: td.Categorical(logits=without_some(x))),
    "OneHotCategorical": joint(SMOOTH["one-hot"]),
    "Bernoulli (MultiBinary)": joint(SMOOTH["bernoulli, logits"]),
    "Binomial": joint(lambda x, free: td.Binomial(5, logits=x)),
    "Poisson": joint(SMOOTH["poisson"]),
    "Normal": joint(SMOOTH["normal, free scale"]),
    "Normal, own scale": joint(SMOOTH["normal, own scale"]),
    "Normal, tanh-squashed": joint(SMOOTH["squashed normal"]),
    "MultivariateNormal, scale": joint(SMOOTH["multivariate, scale"]),
    "MultivariateNormal, covariance": joint(SMOOTH["multivariate, covariance"]),
    "MultivariateNormal, precision": joint(SMOOTH["multivariate, precision"]),
    "LowRankMultivariateNormal": joint(SMOOTH["low rank"]),
    "Beta": joint(SMOOTH["beta"]),
    "Dirichlet": joint(SMOOTH["dirichlet"]),
    "Gamma": joint(SMOOTH["gamma"]),
    "Laplace": joint(lambda x, free: td.Laplace(x[:, :3], positive(x[:, 3:]))),
    "tuple (MultiDiscrete)": Family(
        lambda x, free: (td.Categorical(logits=x[:, :2]), td.Categorical(logits=x[:, 2:]))
    ),
    "dict (Dict)": Family(
        lambda x, free: {
            "gear": td.Categorical(logits=x[:, :3]),
            "wheel": td.Independent(td.Normal(x[:, 3:], free.exp()), 1),
        }
    ),
    "tokens, padded": Family(
        lambda x, free: td.Categorical(logits=x.view(-1, 2, 3)),
        mask=lambda samples: torch.arange(2 * samples).view(-1, 2) % 3 > 0,
    ),
    "mixture, sampled KL": Family(mixture, sampled=True),
}
