"""Simulators: how the state of an environment's physics or emulator is read and written."""

from __future__ import annotations

import functools
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary

import numpy as np

from trpo_optim.errors import TrustRegionError

__all__ = ["Simulator", "register_simulator", "simulator_of", "type_name"]

Array = np.ndarray[Any, Any]


@dataclass(frozen=True)
class Simulator:
    """How the state of one type of simulator is captured and restored.

    Attributes:
        capture: Returns a simulator's state. The state shares no memory with it and can be pickled.
        restore: Writes a state into a simulator of the same type, in place.
        check: Raises a ``TrustRegionError`` if a state does not fit a simulator. It is called
            before anything is restored.
        holds: Returns whether an array is a view of the simulator's memory and needs no restoring.

    Example:
        >>> from trpo_optim.snapshots import Simulator
        >>> world = {"position": 1.0}
        >>> simulator = Simulator(capture=dict, restore=lambda live, saved: live.update(saved))
        >>> saved = simulator.capture(world)
        >>> world["position"] = 2.0
        >>> simulator.restore(world, saved)
        >>> world
        {'position': 1.0}
    """

    capture: Callable[[Any], Any]
    restore: Callable[[Any, Any], None]
    check: Callable[[Any, Any], None] = lambda simulator, saved: None  # noqa: ARG005 (one form)
    holds: Callable[[Any, Array], bool] = lambda simulator, array: False  # noqa: ARG005 (one form)


def register_simulator(name: str, simulator: Simulator) -> None:
    """Register a type of simulator, so that environments that hold one can be captured.

    Args:
        name: The type's name, ``module.qualname``. The module need not be imported.
        simulator: How its state is captured and restored.

    Example:
        >>> from trpo_optim.snapshots import Simulator, register_simulator
        >>> load = lambda world, saved: world.load(saved)
        >>> simulator = Simulator(capture=lambda world: world.save(), restore=load)
        >>> register_simulator("my_physics.World", simulator)
    """
    _SIMULATORS[name] = simulator
    _simulator_of_kind.cache_clear()


def simulator_of(value: object) -> Simulator | None:
    """Return how the state of a value is taken, or None where it is no known simulator."""
    kind: Any = type(value)  # which mypy does not hold to be hashable
    return _simulator_of_kind(kind)


@functools.cache
def _simulator_of_kind(kind: Any) -> Simulator | None:
    known = (_SIMULATORS.get(type_name(each)) for each in kind.__mro__)
    return next((each for each in known if each is not None), None)


def type_name(kind: Any) -> str:
    """Return ``module.qualname`` of a type; some of SWIG's have no module."""
    return f"{getattr(kind, '__module__', '')}.{kind.__qualname__}"


_KEPT_ARRAYS: WeakKeyDictionary[Any, tuple[str, ...]] = WeakKeyDictionary()


def _kept_arrays(model: Any) -> tuple[str, ...]:
    """Return the names of MuJoCo's arrays that live from step to step.

    The others, of contacts and constraints, are made anew by every step; fresh data has none.
    """
    import mujoco  # the extra that needs it is not this one's

    if model not in _KEPT_ARRAYS:
        data = mujoco.MjData(model)
        found = ((name, getattr(data, name, None)) for name in dir(data) if name[0] != "_")
        _KEPT_ARRAYS[model] = tuple(
            name for name, each in found if isinstance(each, np.ndarray) and each.size
        )
    return _KEPT_ARRAYS[model]


def _model_digest(model: Any) -> int:
    """Return a number that another model does not have, nor this one with other parameters."""
    import mujoco  # the extra that needs it is not this one's

    content = np.empty(mujoco.mj_sizeModel(model), np.uint8)
    mujoco.mj_saveModel(model, None, content)
    return zlib.crc32(content.tobytes())


def _capture_mujoco(data: Any) -> dict[str, Any]:
    """Return the integration state, and all that is derived from it, as it lags behind."""
    import mujoco  # the extra that needs it is not this one's

    size = mujoco.mj_stateSize(data.model, mujoco.mjtState.mjSTATE_INTEGRATION)
    state = np.empty(size)
    mujoco.mj_getState(data.model, data, state, mujoco.mjtState.mjSTATE_INTEGRATION)
    arrays = {name: getattr(data, name).copy() for name in _kept_arrays(data.model)}
    return {"model": _model_digest(data.model), "state": state, "arrays": arrays}


def _check_mujoco(data: Any, saved: dict[str, Any]) -> None:
    if saved["model"] != _model_digest(data.model):
        raise TrustRegionError(
            "The MuJoCo model is not the model that the state was captured with, or its parameters "
            "have changed. Restore the state into an environment with the same model. If the "
            "environment changes its model at every reset, use Replayed."
        )


def _restore_mujoco(data: Any, saved: dict[str, Any]) -> None:
    import mujoco  # the extra that needs it is not this one's

    mujoco.mj_setState(data.model, data, saved["state"], mujoco.mjtState.mjSTATE_INTEGRATION)
    for name, array in saved["arrays"].items():
        getattr(data, name)[...] = array


def _held_by_mujoco(data: Any, array: Array) -> bool:
    """Return whether an array lies in the data's memory, itself or as a slice of what does."""
    whole = array
    while isinstance(whole.base, np.ndarray):
        whole = whole.base
    return whole.base is not None and any(
        np.may_share_memory(array, getattr(data, name)) for name in _kept_arrays(data.model)
    )


def _capture_atari(ale: Any) -> Any:
    """Return the emulator's state with its random numbers, but for the last action executed."""
    if ale.getFloat("repeat_action_probability") > 0:
        raise TrustRegionError(
            "This Atari emulator repeats actions at random and hides which action it executed "
            "last, so its state cannot be captured. Make it with repeat_action_probability=0 and "
            "wrap it in gymnasium.wrappers.StickyAction(env, 0.25)."
        )
    return ale.cloneState(include_rng=True)


_SIMULATORS = {
    "trpo_optim.snapshots.replay.Journal": Simulator(
        lambda journal: journal.capture(), lambda journal, saved: journal.restore(saved)
    ),
    "mujoco._structs.MjData": Simulator(
        _capture_mujoco, _restore_mujoco, _check_mujoco, _held_by_mujoco
    ),
    "ale_py._ale_py.ALEInterface": Simulator(
        _capture_atari, lambda ale, saved: ale.restoreState(saved)
    ),
}
