"""Between Gymnasium's observations and actions and tensors."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import gymnasium as gym
import numpy as np
import torch
from torch import Tensor
from torch.distributions import Distribution

from trpo_optim.distributions.nesting import mapped
from trpo_optim.errors import TrustRegionError

__all__ = [
    "actions_for",
    "array_of",
    "copies_of",
    "evaluated",
    "in_form_of",
    "one_of",
    "require_form",
    "require_known",
    "require_state",
    "stacked",
    "tensors_of",
]

_KNOWN = (
    gym.spaces.Box,
    gym.spaces.Discrete,
    gym.spaces.MultiDiscrete,
    gym.spaces.MultiBinary,
)


def require_known(space: gym.Space[Any], what: str) -> None:
    """Check that a space holds arrays of one shape, or tuples and dicts of such.

    Args:
        space: Of one environment.
        what: What it is the space of, for the error.

    Raises:
        TrustRegionError: If it is another, which is named.
    """
    if isinstance(space, gym.spaces.Tuple):
        for each in space.spaces:
            require_known(each, what)
    elif isinstance(space, gym.spaces.Dict):
        for each in space.spaces.values():
            require_known(each, what)
    elif not isinstance(space, _KNOWN):
        raise TrustRegionError(
            f"The environments' {what} hold a {type(space).__name__}, whose values have no fixed "
            "shape. Flatten or encode them in a wrapper, to Box, Discrete, MultiDiscrete, "
            "MultiBinary, or Tuple and Dict of these."
        )


def require_state(state: Any, count: int, called: str) -> None:
    """Check that a recurrent state has the environments as its second dimension.

    Args:
        state: The state.
        count: How many environments there are.
        called: What the error calls the state.

    Raises:
        TrustRegionError: If a part of it is no tensor, or has another second dimension.
    """

    def check(each: Any) -> None:
        if not isinstance(each, Tensor):
            raise TrustRegionError(
                f"{called} holds a {type(each).__name__}; it must be a tensor, or a tuple, named "
                "tuple, list or dict of tensors. Put the state into one of these."
            )
        if each.dim() < 2 or each.shape[1] != count:
            raise TrustRegionError(
                f"{called} holds a tensor of shape {tuple(each.shape)}; its second dimension must "
                f"be the {count} environments, as torch.nn's recurrences have it: (layers, N, …)."
            )

    mapped(check, state)


def array_of(value: Any) -> np.ndarray[Any, Any]:
    """Return an array on the CPU that shares no memory with an array, a tensor or a number."""
    if not isinstance(value, Tensor):
        return np.array(value)
    if value.is_floating_point() and value.dtype.itemsize < 4:
        value = value.float()  # NumPy has no bfloat16
    return np.array(value.detach().cpu().numpy())


def copies_of(values: Any) -> Any:
    """Return arrays and tensors as they are, that share no memory with these."""

    def copied(value: Any) -> Any:
        if isinstance(value, Tensor):
            return value.clone()
        return value.copy() if isinstance(value, np.ndarray) else value

    return mapped(copied, values)


def evaluated(function: Callable[..., Any], *values: Any, info: Mapping[str, Any]) -> Any:
    """Return what a policy or a critic makes of copies: it may write its input (``x -= mean``).

    Args:
        function: The policy or the critic.
        values: Its arguments: observations, and with a recurrent state the state and the starts.
        info: Its keyword arguments.
    """
    given, said = copies_of((values, info))
    return function(*given, **said)


def tensors_of(observations: Any, device: torch.device | str) -> Any:
    """Return observations as tensors: real numbers in torch's default type, others in their own."""

    def tensor(value: Any) -> Tensor:  # copies: environments may reuse their memory
        made = value if isinstance(value, Tensor) else torch.from_numpy(np.array(value))
        kind = torch.get_default_dtype() if made.is_floating_point() else made.dtype
        return made.detach().to(device=device, dtype=kind, copy=made is value)

    return mapped(tensor, observations)


def one_of(observations: Any, index: int) -> Any:
    """Return one environment's observation as arrays, out of a batch or an array of objects."""
    if isinstance(observations, Mapping):
        return {name: one_of(each, index) for name, each in observations.items()}
    if isinstance(observations, tuple):
        return tuple(one_of(each, index) for each in observations)
    return mapped(array_of, observations[index])


def stacked(steps: Sequence[Any]) -> Any:
    """Return arrays or tensors of many steps as one, the steps first."""

    def stack(*each: Any) -> Any:
        return torch.stack(each) if isinstance(each[0], Tensor) else np.stack(each)

    return mapped(stack, *steps)


def require_form(space: gym.Space[Any], made: Any) -> None:
    """Check that a policy returned a distribution or actions for every part of a space.

    Args:
        space: The action space of one environment.
        made: What the policy returned.

    Raises:
        TrustRegionError: If it returned something else.
    """
    if isinstance(made, Distribution):
        return
    inner, wanted = _parts_of(space)
    if inner is None and isinstance(made, Tensor):
        return
    if inner is None:  # a tuple with a part for each element of an action, or for as many elements
        count = len(made) if isinstance(made, tuple | list) else 0
        fits = count and math.prod(space.shape or ()) % count == 0
        inner = dict.fromkeys(range(count) if fits else [None], gym.spaces.Discrete(2))
    given = _by_name(made)
    if given is None or set(given) != set(inner):
        raise TrustRegionError(
            f"The policy returned {_described(made)}, and {space} takes {wanted}. Return nothing "
            "else beside it, and let another function return a critic's value. Only a recurrent "
            "policy, for which you pass state=, returns (distribution, next state)."
        )
    for name, part in inner.items():
        require_form(part, given[name])


def _parts_of(space: gym.Space[Any]) -> tuple[dict[Any, gym.Space[Any]] | None, str]:
    """Return the spaces that a Dict or Tuple has by name, and what a policy returns for a space."""
    if isinstance(space, gym.spaces.Dict):
        names = list(space.spaces)
        return dict(space.spaces), f"a dict of one distribution for each of {names}"
    if isinstance(space, gym.spaces.Tuple):
        return dict(enumerate(space.spaces)), f"a tuple of {len(space.spaces)} distributions"
    return None, "one distribution over actions, or a tensor of actions"


def _by_name(values: Any) -> Mapping[Any, Any] | None:
    """Return the parts of a dict, tuple or list by name or number; None of anything else."""
    if isinstance(values, tuple | list):
        return dict(enumerate(values))
    return values if isinstance(values, Mapping) else None


def _described(made: Any) -> str:
    """Return of which types a value is made."""
    if isinstance(made, Mapping):
        inside = ", ".join(f"{name!r}: {_described(each)}" for name, each in made.items())
        return f"{{{inside}}}"
    if isinstance(made, tuple | list):
        return f"({', '.join(map(_described, made))})"
    return type(made).__name__


def actions_for(space: gym.Space[Any], actions: Any) -> Any:
    """Return a batch of drawn actions as vector environments of a space take them.

    Args:
        space: The action space of one environment.
        actions: What ``sample`` returned: Discrete from 0 on, MultiDiscrete as a tuple or stacked.

    Returns:
        Arrays: a Discrete's start added, and a Box's clipped to its bounds.

    Raises:
        TrustRegionError: If the actions are not of the space's form or shape.
    """
    inner, wanted = _parts_of(space)
    if inner is not None:
        given = _by_name(actions)
        if given is None or set(given) != set(inner):
            raise TrustRegionError(
                f"The policy's distribution gives actions as {_described(actions)}, and {space} "
                f"takes them by part. Return {wanted} from the policy."
            )
        taken = {name: actions_for(part, given[name]) for name, part in inner.items()}
        return taken if isinstance(space, gym.spaces.Dict) else tuple(taken.values())
    if isinstance(actions, tuple | list):
        if len(shapes := {tuple(each.shape) for each in actions}) > 1:
            raise TrustRegionError(
                f"The policy's actions for {space} are a tuple of tensors of shapes "
                f"{sorted(shapes)}; its parts must be of one shape. If one of them is a critic's "
                "value, let another function return it."
            )
        actions = torch.stack(list(actions), -1)
    values = array_of(actions)
    shape: tuple[int, ...] = space.shape or ()
    if values.size != len(values) * math.prod(shape):
        raise TrustRegionError(
            f"The policy's actions have shape {values.shape}, and {space} takes {shape} per "
            "environment. Return a distribution over actions from the policy, not logits or means."
        )
    values = values.reshape(-1, *shape)
    if not isinstance(space, gym.spaces.Box) and (values != np.trunc(values)).any():
        raise TrustRegionError(
            f"The policy's actions are such as {values.ravel()[0]}, and {space} takes whole "
            "numbers. Return a discrete distribution, such as Categorical."
        )
    if isinstance(space, gym.spaces.Discrete | gym.spaces.MultiDiscrete):
        values = values + space.start
    if isinstance(space, gym.spaces.Box):
        return values.clip(space.low, space.high).astype(space.dtype, copy=False)
    return values.astype(space.dtype, copy=False)


def in_form_of(observations: Any, actions: Any) -> Any:
    """Return arrays of actions as tensors, where the observations are tensors, on their device."""
    first = observations
    while isinstance(first, Mapping | tuple):
        first = next(iter(first.values() if isinstance(first, Mapping) else first))
    if not isinstance(first, Tensor):
        return actions
    return mapped(lambda each: torch.as_tensor(each, device=first.device), actions)
