"""What rounding does to a function of the parameters along a step."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch

__all__ = ["CERTAIN", "departures"]

CERTAIN = 4.0
"""How many times its standard deviation rounding may change a number."""

_MULTIPLES = (0.5, 0.65, 0.8, 0.95, 1.1, 1.25, 1.4)
"""Multiples of a step at which a smooth function follows a parabola. What does not is rounding."""


def departures(value: Callable[[float], float]) -> tuple[float, float]:
    """Return the rounding of a function, from how it differs from parabolas on both sides.

    Args:
        value: From a multiple of a small step to a number.

    Returns:
        The standard deviation, and the mean of what the parabolas are at no step.
    """
    multiples = torch.tensor(_MULTIPLES, dtype=torch.float64, device="cpu")
    powers = torch.stack([multiples**0, multiples, multiples**2], 1)
    squares, offsets = 0.0, 0.0
    for sign in (1.0, -1.0):
        values = [value(sign * each) for each in _MULTIPLES]
        wanted = torch.tensor(values, dtype=torch.float64, device="cpu")[:, None]
        solution = torch.linalg.lstsq(powers, wanted).solution
        squares += float((powers @ solution - wanted).square().sum())
        offsets += float(solution[0]) / 2
    return math.sqrt(squares / (2 * (len(multiples) - 3))), offsets
