"""Which attributes of an environment are its state, and a copy of them that shares no memory."""

from __future__ import annotations

import copy
import functools
import random
import weakref
from collections import Counter, OrderedDict, defaultdict, deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from datetime import date, time, timedelta
from decimal import Decimal
from enum import Enum
from fractions import Fraction
from pathlib import PurePath
from types import MethodType, SimpleNamespace
from typing import Any

import gymnasium as gym
import numpy as np
import torch
from gymnasium.vector import VectorEnv

from trpo_optim.errors import TrustRegionError
from trpo_optim.snapshots.made_once import MADE_ONCE, made_once
from trpo_optim.snapshots.simulators import Array, type_name
from trpo_optim.snapshots.views import Storages, TensorView, View, is_plain, other_form

__all__ = ["Memo", "copied", "is_environments", "is_state"]

_ATOMS = {type(None), bool, int, float, complex, str, bytes}

_UNCHANGING = (
    np.generic,
    np.dtype,
    torch.device,
    torch.dtype,
    Enum,
    range,
    Fraction,
    Decimal,
    date,
    time,
    timedelta,
    PurePath,
    *MADE_ONCE,
)

_ARGUMENTS = {"_saved_kwargs", "_ezpickle_args", "_ezpickle_kwargs", "_cached_spec"}
"""Where Gymnasium keeps what the constructor was called with."""

_MODELS_AND_SCREENS = ("mujoco.", "pygame.", "gymnasium.envs.mujoco.mujoco_rendering")


def is_state(layer: object, name: str, value: object) -> bool:
    """Return whether an attribute is data that a step may change.

    Args:
        layer: An environment or wrapper.
        name: The attribute's name.
        value: The attribute.

    Returns:
        False for what the constructor makes and no step changes: spaces, models, networks,
        optimizers, functions, locks, loggers, open files, renderers, inner environments, the
        transition tables of toy text.
    """
    if name in _ARGUMENTS:
        return False
    if type(value) in _ATOMS:
        return True
    if isinstance(value, MethodType) and isinstance(value.__self__, gym.Env | VectorEnv):
        return True  # such as the next phase of a state machine
    return not (
        made_once(value)
        or type_name(type(value)).startswith(_MODELS_AND_SCREENS)
        or (name == "P" and type(layer).__module__.startswith("gymnasium.envs.toy_text"))
    )


class Memo(dict[int, Any]):
    """Copies by the identity of what they are of, with the original, which keeps it alive.

    Attributes:
        holds: Whether an array is a view of a simulator's memory.
        keeping: Whether the copy is to be kept, or is the environment's again.
        storages: The memory of tensors.
    """

    def __init__(
        self, known: Iterable[tuple[int, Any]], holds: Callable[[Array], bool] | None = None
    ) -> None:
        super().__init__(known)
        self.keeping = holds is not None
        self.holds = holds or (lambda _: False)
        self.storages: Storages = {}


def is_environments(value: object) -> bool:
    """Return whether a value is a list of environments, as vector environments have them."""
    return (
        isinstance(value, list | tuple)
        and bool(value)
        and all(isinstance(each, gym.Env | VectorEnv) for each in value)
    )


def copied(value: Any, memo: Memo, place: str) -> Any:
    """Return data copied throughout; what is one object stays one.

    Copied once it is as it is kept, and copied again as the environment had it.

    Args:
        value: The data.
        memo: What has been copied.
        place: Where it stands, for the error.

    Returns:
        The copy.

    Raises:
        TrustRegionError: If something in it is not known to be data.
    """
    kind: Any = type(value)
    if kind in _ATOMS:
        return value
    if (known := memo.get(id(value))) is not None:
        return known[0]
    if kind is _Reference:
        return value.make(copied(value.target, memo, place))
    if (look := _REFERENCES.get(kind)) is not None:
        target, again = look(value)
        if isinstance(target, gym.Env | VectorEnv) and id(target) in memo:
            return _Reference(memo[id(target)][0], again)
    if isinstance(value, gym.Env | VectorEnv):
        raise TrustRegionError(
            f"The environment cannot be captured: {place} is another environment. Hold "
            "environments as attributes, or in a list of environments alone that is an attribute."
        )
    if isinstance(value, np.void) and (value.base is None or value.base.size == 1):
        return value.copy()
    if isinstance(value, np.void):
        raise TrustRegionError(
            f"The environment cannot be captured: {place} is a row of a structured array and "
            "shares its memory. Take the row anew at every step."
        )
    if isinstance(value, _UNCHANGING):
        return value
    if kind is np.ndarray and memo.holds(value):
        raise TrustRegionError(
            f"The environment cannot be captured: {place} is a view of the simulator's memory. "
            "Hold such a view as an attribute of its own, or take it anew at every step."
        )
    if kind is TensorView:
        tensor = value.on(copied(value.base, memo, place))
        memo[id(value)] = (tensor, value)
        return tensor
    if kind is View or (
        kind is np.ndarray and isinstance(value.base, np.ndarray) and not value.dtype.hasobject
    ):
        view = other_form(value, copied(value.base, memo, place))
        memo[id(value)] = (view, value)
        return view
    twin: Any
    if (make := _COPIES.get(kind)) is not None:
        twin = make(value)
    elif kind is torch.Tensor and memo.keeping and is_plain(value):
        twin = TensorView.of(value, memo.storages)
    elif isinstance(value, torch.Tensor):
        twin = value.detach().clone().requires_grad_(value.requires_grad and value.is_leaf)
    elif isinstance(value, tuple) and hasattr(kind, "_make"):  # a namedtuple
        twin = kind._make(copied(each, memo, f"{place}[…]") for each in value)
    elif kind in {tuple, set, frozenset}:
        twin = kind(copied(each, memo, f"{place}[…]") for each in value)
    elif kind in {list, deque, dict, OrderedDict, defaultdict, Counter}:
        twin = value.copy()
    elif (twin := _blank(kind)) is not None:
        pass
    elif type_name(kind) == "ale_py._ale_py.Action":
        return value  # an enumeration of pybind11's, before ale-py 0.12
    else:
        raise TrustRegionError(
            f"The environment cannot be captured: {place} is a {type_name(kind)}, whose state is "
            "hidden. Make it with trpo_optim.snapshots.restorable, which replays such an "
            "environment, or register its simulator with register_simulator."
        )
    memo[id(value)] = (twin, value)  # before its parts, which may refer to it
    if kind in {list, deque}:
        for index, each in enumerate(value):
            twin[index] = copied(each, memo, f"{place}[{index}]")
    elif kind is np.ndarray and value.dtype == object:
        for where, each in np.ndenumerate(value):
            twin[where] = copied(each, memo, f"{place}[…]")
    elif isinstance(value, dict):
        twin.clear()
        for key, each in value.items():
            twin[copied(key, memo, f"{place}[…]")] = copied(each, memo, f"{place}[{key!r}]")
    elif _is_plain_object(kind):
        for name, each in vars(value).items():
            object.__setattr__(twin, name, copied(each, memo, f"{place}.{name}"))
    return twin


@dataclass(frozen=True, eq=False)
class _Reference:
    """A method of an environment, or a weak reference to one, while it is kept."""

    target: Any
    make: Callable[[Any], Any]


# Functions of this module can be pickled; the types of methods and weak references cannot.
def _method(function: Callable[..., Any], environment: Any) -> Any:
    return MethodType(function, environment)


def _weak(environment: Any) -> Any:
    return weakref.ref(environment)


def _proxy(environment: Any) -> Any:
    return weakref.proxy(environment)


_REFERENCES: dict[Any, Callable[[Any], tuple[Any, Callable[[Any], Any]]]] = {
    MethodType: lambda value: (value.__self__, functools.partial(_method, value.__func__)),
    weakref.ReferenceType: lambda value: (value(), _weak),
    weakref.ProxyType: lambda value: (value.__repr__.__self__, _proxy),
}
"""From what refers to an object to that object, and what makes another of it."""


def _generator_like(generator: np.random.Generator) -> np.random.Generator:
    """Return a twin; three times as fast as ``copy.deepcopy``."""
    bits = generator.bit_generator
    seeds: Any = bits.seed_seq
    own = isinstance(seeds, np.random.SeedSequence)
    twin = type(bits)(np.random.SeedSequence(**seeds.state) if own else None)
    twin.state = bits.state
    return np.random.Generator(twin)


_COPIES: dict[type, Callable[[Any], Any]] = {
    bytearray: bytearray,
    np.ndarray: lambda array: array.copy(order="K"),
    np.random.Generator: _generator_like,
    np.random.RandomState: copy.deepcopy,
    random.Random: copy.deepcopy,
}


class _Plain:
    """As large as an object is whose state is all in its ``__dict__``."""


def _blank(kind: Any) -> Any:
    """Return an object whose attributes are all to be set, or None if there is no such object."""
    if not _is_plain_object(kind):
        return None
    if kind.__new__ is SimpleNamespace.__new__:  # it makes its own alone
        return kind.__new__(kind)
    try:
        return object.__new__(kind)
    except TypeError:  # of a type that is written in C
        return None


def _is_plain_object(kind: type) -> bool:
    return kind.__dictoffset__ != 0 and kind.__basicsize__ <= _Plain.__basicsize__
