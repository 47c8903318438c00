"""What an optimizer keeps of a parameter between steps: what ``state_dict`` saves."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from trpo_optim.algorithm.preconditioner import DiagonalPreconditioner
from trpo_optim.closure.parameters import ParameterVector
from trpo_optim.hyperparameters import Hyperparameters

__all__ = ["preconditioner_of", "with_preconditioner"]

_NAME = "gradient_rms"
"""The root of the mean squared gradient, in the parameter's shape and dtype."""

_State = defaultdict[Tensor, dict[str, Any]]


def preconditioner_of(
    state: Mapping[Tensor, dict[str, Any]], settings: Hyperparameters, vector: ParameterVector
) -> DiagonalPreconditioner | None:
    """Return the preconditioner of a step, from what earlier steps have left.

    Args:
        state: The optimizer's.
        settings: The hyperparameters.
        vector: The parameters.
    """
    if settings.preconditioner == "none" or settings.mode == "vanilla":
        return None
    roots = [
        state.get(parameter, {}).get(_NAME, torch.full_like(parameter, torch.nan))
        for parameter in vector.parameters
    ]
    return DiagonalPreconditioner(vector.gather(roots), settings.preconditioner_decay)


def with_preconditioner(
    state: _State, preconditioner: DiagonalPreconditioner | None, vector: ParameterVector
) -> _State:
    """Return the optimizer's state after a step.

    Args:
        state: Before the step; not modified.
        preconditioner: Of the step, or None.
        vector: The parameters.
    """
    if preconditioner is None:
        return state
    kept = defaultdict(dict, {each: dict(own) for each, own in state.items()})
    roots = vector.scatter(preconditioner.roots)
    for parameter, root in zip(vector.parameters, roots, strict=True):
        kept[parameter] = {**kept[parameter], _NAME: root.clone()}
    return kept
