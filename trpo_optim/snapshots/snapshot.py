"""Capture the whole state of an environment as a value, and restore it."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import gymnasium as gym
import numpy as np
from gymnasium.envs.registration import EnvSpec
from gymnasium.vector import AsyncVectorEnv, VectorEnv

from trpo_optim.errors import TrustRegionError
from trpo_optim.snapshots.made_once import made_once
from trpo_optim.snapshots.replay import Replayed
from trpo_optim.snapshots.simulators import Simulator, simulator_of
from trpo_optim.snapshots.state_data import Memo, copied, is_environments, is_state

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
        bound: The functions, spaces and others of their kind that its attributes were, and what
            lists of these held. They go back to the layer itself alone, and are not pickled.
        owner: Refers to the layer.
    """

    name: str
    attributes: frozenset[str]
    data: dict[str, Any]
    simulators: dict[str, Any]
    bound: dict[str, tuple[Any, list[Any]]]
    owner: Callable[[], Any]

    def __reduce__(self) -> tuple[Any, ...]:
        """Leave out what cannot be pickled."""
        return Layer, (self.name, self.attributes, self.data, self.simulators, {}, _nobody)


def _nobody() -> None:
    """Refer to no layer."""


@dataclass(frozen=True, eq=False)
class Snapshot:
    """The state of an environment and all its wrappers. It can be pickled.

    Attributes:
        layers: The states of wrappers and environment, from the outside in. For vector
            environments, those of each environment.

    Example:
        >>> import gymnasium as gym, pickle
        >>> from trpo_optim.snapshots import capture, restore
        >>> env = gym.make("CartPole-v1")
        >>> observation, info = env.reset(seed=0)
        >>> snapshot = pickle.loads(pickle.dumps(capture(env)))
        >>> [layer.name for layer in snapshot.layers][-1]
        'CartPoleEnv(CartPole-v1)'
    """

    layers: tuple[Layer, ...]


def capture(env: Environment) -> Snapshot:
    """Capture the state of an environment: simulator, clocks, random state, wrappers.

    The attributes of all wrappers and of the environment are copied if they are data. Attributes
    that only the constructor sets are not copied: spaces, specs, functions, models, networks,
    optimizers, locks, loggers, open files, renderers. If such an attribute has become another
    object, ``restore`` binds the first one again, in the same environment. References back to a
    wrapper or the environment, such as a helper's, refer to the restored environment. An object
    that is shared with the outside, such as a list, is no longer shared after ``restore``.

    MuJoCo and the Arcade Learning Environment are supported. ``register_simulator`` adds other
    simulators, and ``Replayed`` needs no simulator. State outside the environment's attributes is
    not captured: the generators of its spaces, NumPy's global generator, attributes of classes,
    variables of closures, and objects that bound methods of helpers belong to.

    Args:
        env: An environment, or vector environments in this process.

    Returns:
        The state, which shares no memory with the environment.

    Raises:
        TrustRegionError: If a part cannot be copied, such as a Box2D world. The text names it.

    Example:
        >>> import gymnasium as gym
        >>> from trpo_optim.snapshots import capture, restore
        >>> env = gym.make("CartPole-v1")
        >>> observation, info = env.reset(seed=0)
        >>> snapshot = capture(env)
        >>> branches = []
        >>> for action in (0, 1):
        ...     restore(env, snapshot)
        ...     branches.append(env.step(action)[0])
        >>> bool((branches[0] == branches[1]).all())
        False
    """
    live = list(_layers(env))
    known = [
        (value, simulator)
        for layer in live
        for value in vars(layer).values()
        if (simulator := simulator_of(value)) is not None
    ]
    layers = [
        Layer(_name_of(layer), frozenset(vars(layer)), {}, {}, {}, weakref.ref(layer))
        for layer in live
    ]
    pairs = zip(live, layers, strict=True)
    memo = Memo(
        ((id(layer), (saved, layer)) for layer, saved in pairs),
        holds=lambda array: _is_held(array, known),
    )
    for layer, saved in zip(live, layers, strict=True):
        for name, value in vars(layer).items():
            if (simulator := simulator_of(value)) is not None:
                saved.simulators[name] = simulator.capture(value)
            elif is_state(layer, name, value) and not _is_held(value, known):
                saved.data[name] = copied(value, memo, f"{type(layer).__name__}.{name}")
            elif made_once(value) and not _is_environment(value):
                saved.bound[name] = (value, list(value) if isinstance(value, list) else [])
    return Snapshot(tuple(layers))


def _is_environment(value: object) -> bool:
    return isinstance(value, gym.Env | VectorEnv) or is_environments(value)


def _is_held(value: object, known: list[tuple[Any, Simulator]]) -> bool:
    """Return whether a value is a view of a simulator's memory, which is restored with that."""
    return isinstance(value, np.ndarray) and any(each.holds(live, value) for live, each in known)


def restore(env: Environment, snapshot: Snapshot) -> None:
    """Restore a state. The environment then goes on exactly as it did from there.

    Constructor arguments that an attribute keeps as data are part of the state.

    Args:
        env: The environment that was captured, or one made in the same way, in any process.
        snapshot: The state from ``capture``. It does not change.

    Raises:
        TrustRegionError: If the environment or its wrappers differ; nothing has changed then. Also
            if a ``Replayed`` environment does not return to its state; reset it then.

    Example:
        >>> import gymnasium as gym
        >>> from trpo_optim.snapshots import capture, restore
        >>> env = gym.make("CartPole-v1")
        >>> observation, info = env.reset(seed=0)
        >>> snapshot = capture(env)
        >>> first = env.step(1)[0]
        >>> restore(env, snapshot)
        >>> bool((env.step(1)[0] == first).all())
        True
    """
    layers = list(_layers(env))
    here, there = [_name_of(layer) for layer in layers], [saved.name for saved in snapshot.layers]
    if here != there:
        raise TrustRegionError(
            f"The state was captured from {' > '.join(there)} and this environment is "
            f"{' > '.join(here)}. Make it in the same way, with the same wrappers."
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
    pairs = zip(layers, snapshot.layers, strict=True)
    memo = Memo((id(saved), (layer, saved)) for layer, saved in pairs)
    for layer, saved in zip(layers, snapshot.layers, strict=True):
        for name in vars(layer).keys() - saved.attributes:
            delattr(layer, name)  # it did not exist yet
        for name, value in saved.data.items():
            setattr(layer, name, copied(value, memo, name))
        for name, (value, items) in saved.bound.items() if saved.owner() is layer else ():
            if vars(layer).get(name) is not value:
                setattr(layer, name, value)
            if isinstance(value, list):
                value[:] = items


def restorable(make: Callable[[], gym.Env[Any, Any]]) -> gym.Env[Any, Any]:
    """Return ``make()`` if that can be captured, and otherwise ``Replayed(make)``.

    Args:
        make: Returns a new environment, as ``functools.partial(gymnasium.make, "Hopper-v5")`` does.
            Put wrappers that remember other episodes around the returned environment.

    Returns:
        The environment.

    Example:
        >>> import functools
        >>> import gymnasium as gym
        >>> from trpo_optim.snapshots import Replayed, restorable
        >>> env = restorable(functools.partial(gym.make, "CartPole-v1"))
        >>> isinstance(env, Replayed)
        False
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
            "AsyncVectorEnv keeps its environments in other processes, where their states cannot "
            "be captured. Use SyncVectorEnv."
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
