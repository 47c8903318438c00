"""Pairs of old and new distributions."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributions as td
from families import Family
from networks import SAMPLES
from torch import Tensor
from torch.distributions import Distribution


def pair(family: Family) -> tuple[Any, Any]:
    """Return two policies of a family, some way apart, in double precision."""
    torch.manual_seed(0)
    x, free = torch.randn(SAMPLES, 6).double(), torch.randn(3).double()
    away = 0.3 * torch.randn(SAMPLES, 6)
    return family.make(x, free), family.make(x + away, free + 0.1)


def parts(dist: Any) -> list[Distribution]:
    if isinstance(dist, Distribution):
        return [dist]
    return list(dist.values() if isinstance(dist, dict) else dist)


def mixture(x: Tensor) -> Distribution:
    return td.MixtureSameFamily(td.Categorical(logits=x[:, :2]), td.Normal(x[:, 2:4], 1.0))


def one(*shape: int) -> Tensor:
    return torch.ones(shape)


plain = td.Categorical(logits=torch.zeros(4, 3))
