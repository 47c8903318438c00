"""The weighted mean of the local models of several closures."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import get_args

from trpo_optim.report import Engine

__all__ = ["largest_of", "least_of", "weighted_mean"]


def least_of(engines: Sequence[tuple[Engine, str]]) -> tuple[Engine, str]:
    """Return the last resort among several engines, with its reason.

    Args:
        engines: The engine of every closure, and why no better one serves it.
    """
    return max(engines, key=lambda each: get_args(Engine).index(each[0]))


def weighted_mean(parts: Sequence[float], values: Sequence[float]) -> float:
    """Return the mean of values, given the share of each.

    Args:
        parts: Their shares, of the sum 1.
        values: As many.
    """
    return sum(part * value for part, value in zip(parts, values, strict=True))


def largest_of(kls: Sequence[float | None]) -> float | None:
    """Return the largest of several largest KLs; None where one of them is not known.

    Args:
        kls: In nats.
    """
    known = [kl for kl in kls if kl is not None]
    if len(known) < len(kls):
        return None
    return math.nan if any(map(math.isnan, known)) else max(known)
