"""The whole state of an environment as a value, to be taken and put back at any moment."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import gymnasium as gym
import numpy as np
from gymnasium.envs.registration import EnvSpec
from gymnasium.vector import AsyncVectorEnv, VectorEnv

from trpo_optim.errors import TrustRegionError
from trpo_optim.snapshots.replay import Replayed
from trpo_optim.snapshots.simulators import Simulator, simulator_of
from trpo_optim.snapshots.state_data import copied, is_environments, is_state

__all__ = ["Environment", "Snapshot", "capture", "restorable", "restore"]

Environment = gym.Env[Any, Any] | VectorEnv[Any, Any, Any]
"""One environment or several side by side, in whatever wrappers."""


@dataclass(frozen=True, eq=False)
class Layer:
    """One environment or wrapper of several; in data that refers back to it, it stands for it.

    Attributes:
        name: Its class, and of the innermost the environment's id.
        attributes: The names of all its attributes.
        data: Those that are state.
        simulators: Its simulators' states by attribute.
    """

    name: str
    attributes: frozenset[str]
    data: dict[str, Any]
    simulators: dict[str, Any]


@dataclass(frozen=True, eq=False)
class Snapshot:
    """The state of an environment and all its wrappers at one moment; it can be pickled.

    Attributes:
        layers: From the outside in; of vector environments, each one's.
    """

    layers: tuple[Layer, ...]


def capture(env: Environment) -> Snapshot:
    """Take the state of an environment: simulator, clocks, random state, wrappers.

    All attributes of all layers are copied that are data; what the constructor makes and nobody
    changes (spaces, specs, functions, models, networks, loggers, renderers) is not. What refers
    back to one of the layers, such as a helper that holds its environment, one of its methods or a
    weak reference to it, refers to the environment that is restored. What is shared with objects
    outside, such as a list that both hold, no longer is after ``restore``. Known simulators are
    MuJoCo's and the Arcade Learning Environment's; ``register_simulator`` adds others, and
    ``Replayed`` does without. Out of sight is what lies outside the environment's attributes: the
    generators of its spaces, NumPy's global one, attributes of classes, variables of closures and
    what methods of objects that are no layer are bound to.

    Args:
        env: An environment, or vector environments that live in this process.

    Returns:
        The state, which shares no memory with the environment.

    Raises:
        TrustRegionError: If something in it cannot be copied, such as a Box2D world; it is named.
    """
    live = list(_layers(env))
    known = [
        (value, simulator)
        for layer in live
        for value in vars(layer).values()
        if (simulator := simulator_of(value)) is not None
    ]
    layers = [Layer(_name_of(layer), frozenset(vars(layer)), {}, {}) for layer in live]
    memo: dict[int, Any] = {
        id(layer): (saved, layer) for layer, saved in zip(live, layers, strict=True)
    }
    for layer, saved in zip(live, layers, strict=True):
        for name, value in vars(layer).items():
            if (simulator := simulator_of(value)) is not None:
                saved.simulators[name] = simulator.capture(value)
            elif is_state(layer, name, value) and not _is_held(value, known):
                saved.data[name] = copied(value, memo, f"{type(layer).__name__}.{name}")
    return Snapshot(tuple(layers))


def _is_held(value: object, known: list[tuple[Any, Simulator]]) -> bool:
    """Return whether a value is a view of a simulator's memory, which is restored with that."""
    return isinstance(value, np.ndarray) and any(each.holds(live, value) for live, each in known)


def restore(env: Environment, snapshot: Snapshot) -> None:
    """Put a state back, after which the environment goes on exactly as it did from there.

    What a constructor was given and an attribute keeps as data is part of the state.

    Args:
        env: The environment that was captured, or one made in the same way, in any process.
        snapshot: What ``capture`` returned; it stays as it is.

    Raises:
        TrustRegionError: If the environment is another or its wrappers are: nothing has changed.
            Or if a ``Replayed`` one does not return to its state: reset it.
    """
    layers = list(_layers(env))
    here, there = [_name_of(layer) for layer in layers], [saved.name for saved in snapshot.layers]
    if here != there:
        raise TrustRegionError(
            f"The state was captured from {' > '.join(there)} and this environment is "
            f"{' > '.join(here)}. Make it in the same way, wrappers included."
        )
    found = []
    for layer, saved in zip(layers, snapshot.layers, strict=True):
        for name, state in saved.simulators.items():
            live = getattr(layer, name, None)
            if (simulator := simulator_of(live)) is None:
                raise TrustRegionError(
                    f"{type(layer).__name__} has no simulator {name!r} yet. Call reset() once on a "
                    "new environment before restoring a state."
                )
            simulator.check(live, state)
            found.append((simulator, live, state))
    for simulator, live, state in found:
        simulator.restore(live, state)
    memo: dict[int, Any] = {
        id(saved): (layer, saved) for layer, saved in zip(layers, snapshot.layers, strict=True)
    }
    for layer, saved in zip(layers, snapshot.layers, strict=True):
        for name in vars(layer).keys() - saved.attributes:
            delattr(layer, name)  # it did not exist yet
        for name, value in saved.data.items():
            setattr(layer, name, copied(value, memo, name))


def restorable(make: Callable[[], gym.Env[Any, Any]]) -> gym.Env[Any, Any]:
    """Return an environment that can be captured: as it is made, or else ``Replayed``.

    Args:
        make: Returns a new environment, as ``functools.partial(gymnasium.make, "Hopper-v5")`` does.
            Wrappers that remember other episodes belong around what is returned.

    Returns:
        The environment.
    """
    env = make()
    env.reset()
    try:
        capture(env)
    except TrustRegionError:
        env.close()
        return Replayed(make)
    return env


def _layers(env: object, seen: set[int] | None = None) -> Iterator[Any]:
    """Yield an environment's layers from the outside in; of vector environments, each one's."""
    if isinstance(env, AsyncVectorEnv):
        raise TrustRegionError(
            "AsyncVectorEnv keeps its environments in other processes, out of reach. Use "
            "SyncVectorEnv where states are to be captured."
        )
    seen = set() if seen is None else seen
    if id(env) in seen:
        return
    seen.add(id(env))
    yield env
    if isinstance(env, Replayed):
        return  # its journal stands for what is in it
    for value in vars(env).values():
        inner = value if is_environments(value) else [value]
        for each in inner:
            if isinstance(each, gym.Env | VectorEnv):
                yield from _layers(each, seen)


def _name_of(layer: object) -> str:
    name = type(layer).__qualname__
    innermost = getattr(layer, "unwrapped", None) is layer or isinstance(layer, Replayed)
    spec = getattr(layer, "spec", None) if innermost else None
    return f"{name}({spec.id})" if isinstance(spec, EnvSpec) else name
