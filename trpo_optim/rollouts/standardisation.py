"""Advantages brought to mean 0 and standard deviation 1, over one process or over all ranks."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from trpo_optim.distributed.collectives import Reduction

__all__ = ["standardised"]


def standardised(
    values: Tensor, valid: Tensor, ranks: Reduction | None, *, weights: Tensor | None = None
) -> Tensor:
    """Bring the valid values to mean 0 and standard deviation 1.

    Mean and variance are computed in double precision. They are those of all ranks together, the
    same on every rank bit for bit, and cost one all-reduce of four numbers a rank.

    Args:
        values: Of a floating-point type, shape (T, N).
        valid: True where a value counts, shape (T, N).
        ranks: The collectives of the processes that hold the values. None: this process alone.
        weights: How much each value counts, above 0, shape (T, N). None: all count alike.

    Returns:
        Shape (T, N). It is 0 where a value is not valid, and everywhere if all valid values of all
        ranks are equal.

    Raises:
        RankError: If another rank was lost.
    """
    used = values[valid].cpu().double()  # on the CPU: some devices have no double precision
    own = _moments(used.detach(), None if weights is None else weights[valid].cpu().double())
    mean, deviation = _combined([own] if ranks is None else ranks.rows(lambda: own, len(own)))
    result = torch.zeros_like(values)
    if deviation > 0:
        result[valid] = ((used - mean) / deviation).to(result)
    return result


def _moments(values: Tensor, weights: Tensor | None) -> list[float]:
    """Return the number of values (B,), their mean, and the sum of their squared deviations.

    With weights, the number is their sum.
    """
    rest = values - values[0]  # so that equal values have no deviation, not even by rounding
    if weights is None:
        mean = rest.mean()
        return [float(len(values)), float(values[0] + mean), float((rest - mean).square().sum())]
    mean = (weights * rest).sum() / weights.sum()
    squares = weights * (rest - mean).square()
    return [float(weights.sum()), float(values[0] + mean), float(squares.sum())]


def _combined(ranks: list[list[float]]) -> tuple[float, float]:
    """Return the mean and the standard deviation of all ranks' values.

    Source:
        Chan, Golub & LeVeque, "Updating Formulae and a Pairwise Algorithm for Computing Sample
        Variances", 1979.
    """
    number = sum(count for count, _, _ in ranks)
    origin = ranks[0][1]  # so that equal means have no deviation, not even by rounding
    mean = origin + sum(count * (each - origin) for count, each, _ in ranks) / number
    squares = sum(inner + count * (each - mean) ** 2 for count, each, inner in ranks)
    return mean, math.sqrt(squares / number)
