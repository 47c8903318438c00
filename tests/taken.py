"""A step taken, and its report."""

from __future__ import annotations

from typing import Any

import torch
from problems import Problem
from torch import Tensor

from trpo_optim import TrustRegionOptimizer
from trpo_optim.hyperparameters import Hyperparameters


def taken(problem: Problem, **settings: Any) -> tuple[Tensor, Any]:
    """Take one step; return the move of the parameters and the report."""
    before = problem.vector()
    report = problem.optimizer(**settings).step(problem.closure)
    assert report.accepted, report
    return problem.vector() - before, report


def settings(**values: Any) -> Hyperparameters:
    optimizer = TrustRegionOptimizer([torch.zeros(1)], **{"lr": 1.0, **values})
    return Hyperparameters(**optimizer.defaults)
