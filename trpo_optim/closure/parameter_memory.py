"""What an optimizer keeps of every parameter between steps, and ``state_dict`` saves."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, MutableMapping
from typing import Any

import torch
from torch import Tensor

from trpo_optim.closure.dtensor import local
from trpo_optim.closure.parameters import ParameterVector
from trpo_optim.errors import TrustRegionError

__all__ = ["begin", "remembered", "require_shapes", "to_remember"]

_NAME = "gradient_rms"
"""The root of the mean squared gradient, in the parameter's shape and dtype; NaN: none yet."""

_State = MutableMapping[Tensor, dict[str, Any]]


def remembered(state: Mapping[Tensor, dict[str, Any]], vector: ParameterVector) -> Tensor:
    """Return the root of the mean squared gradient, shape (n,); NaN where there is none yet.

    Args:
        state: The optimizer's.
        vector: The parameters.
    """
    known = [state.get(each, {}).get(_NAME) for each in vector.parameters]
    return vector.gather(
        [
            torch.full_like(parameter, torch.nan) if own is None else own
            for parameter, own in zip(vector.parameters, known, strict=True)
        ]
    )


def begin(state: _State, parameters: Iterable[Tensor]) -> None:
    """Make room for what is kept of parameters, where there is none.

    Args:
        state: The optimizer's.
        parameters: The parameters.
    """
    for each in parameters:
        if _NAME not in state[each]:
            state[each][_NAME] = torch.full_like(each, torch.nan)


def to_remember(
    state: _State, vector: ParameterVector, roots: Tensor
) -> tuple[list[Tensor], list[Tensor]]:
    """Return where the root of the mean squared gradient is kept, and what is to be written there.

    Args:
        state: The optimizer's, in which ``begin`` has made room.
        vector: The parameters.
        roots: Shape (n,).
    """
    targets = [local(state[each][_NAME]) for each in vector.parameters]
    return targets, list(map(local, vector.scatter(roots)))


def require_shapes(optimizer: torch.optim.Optimizer, state_dict: dict[str, Any]) -> None:
    """Check that what was saved of a parameter has its shape.

    Args:
        optimizer: Into which a state is about to be loaded.
        state_dict: The state.

    Raises:
        TrustRegionError: If it has another.
    """
    for group, saved in zip(optimizer.param_groups, state_dict["param_groups"], strict=False):
        for parameter, index in zip(group["params"], saved["params"], strict=False):
            own = state_dict["state"].get(index, {}).get(_NAME)
            if own is not None and own.shape != parameter.shape:
                raise TrustRegionError(
                    f"The saved {_NAME} of parameter {index} has shape {tuple(own.shape)}, and the "
                    f"parameter has shape {tuple(parameter.shape)}. Load the state into the same "
                    "policy, with the parameters in the same order."
                )
