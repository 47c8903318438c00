"""Averages over drawn actions, and what noise may put between two of them."""

from __future__ import annotations

from statistics import NormalDist

import torch
from torch import Tensor

__all__ = ["average", "counting", "sigmas"]

_FALSE_ALARM = 1e-7
"""The chance that one comparison of averages finds a sound policy at fault."""

_RARE = 1e-5
"""The share of actions without a finite value that an average may leave out."""


def counting(values: Tensor, weights: Tensor) -> Tensor:
    """Return weights, those of values that are not finite 0 if hardly any action is among these."""
    gone = weights * ~values.isfinite()
    return torch.where(gone > 0, 0.0, weights) if gone.sum() <= _RARE * weights.sum() else weights


def average(values: Tensor, weights: Tensor) -> tuple[float, float]:
    """Return a weighted mean over draws and rows, and its standard error.

    Rows may differ; only the spread within a row is noise.
    """
    weights = counting(values, weights)
    values = torch.where(weights > 0, values, 0)  # beyond the support's edge they may be NaN
    total = weights.sum()
    within = (weights * values).sum(0) / weights.sum(0).clamp_min(1e-300)
    error = (weights * (values - within)).square().sum().sqrt() / total
    return float((weights * values).sum() / total), float(error)


def sigmas(comparisons: int) -> float:
    """Return how many standard errors noise may explain, with a false alarm as rare as stated."""
    return NormalDist().inv_cdf(1 - _FALSE_ALARM / comparisons / 2)
