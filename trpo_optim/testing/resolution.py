"""Which actions floating point resolves: the next number has about the same log-probability."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

__all__ = ["resolved"]

_APART = 0.25
"""By how much a feature of an action may differ from that of the next number."""


def resolved(features: Callable[[Tensor], Tensor], actions: Tensor, support: Any) -> Tensor:
    """Return which actions are told apart from their neighbours, shape (draws, rows).

    Args:
        features: From actions to numbers of about unit scale, (draws, rows, features), such as
            their log-probability.
        actions: Shape (draws, *batch, *event).
        support: Where actions may be.

    Returns:
        False where a feature is not finite, or differs from that of the next number: near the edge
        of the support, or where the distribution is about as narrow as the numbers are dense.
    """
    here = features(actions)
    found = here.isfinite().all(-1)
    generator = torch.Generator("cpu").manual_seed(0)
    up = torch.rand(actions.shape, generator=generator, device="cpu").to(actions.device) < 0.5
    for way in (up, ~up):
        far = torch.where(way, torch.inf, -torch.inf).to(actions)
        next_to = torch.nextafter(actions, far)
        inside = support.check(next_to)
        inside = inside.reshape(*inside.shape, *[1] * (actions.dim() - inside.dim()))
        apart = features(torch.where(inside, next_to, actions)) - here
        found &= (apart.abs() <= _APART).all(-1)
    return found
