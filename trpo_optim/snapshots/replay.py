"""Environments whose simulator hides its state, restored by replaying their episode."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from typing import Any

import gymnasium as gym
import numpy as np
from gymnasium.utils.env_checker import data_equivalence

from trpo_optim.errors import TrustRegionError

__all__ = ["Journal", "Replayed"]


class Replayed(gym.Wrapper[Any, Any, Any, Any]):
    """Make an environment restorable whose simulator is not, such as Box2D's.

    Its state is the seed of the episode and the actions since. Restoring it replays the episode and
    takes as long as the episode did. Every episode runs in a new environment and has its own seed.
    Without a seed, ``reset`` draws one from the last environment.

    Args:
        make: Returns a new environment, as ``gymnasium.make`` does. Put wrappers that remember
            other episodes (normalisation, statistics) around this one, not in it.

    Example:
        >>> import gymnasium as gym
        >>> from trpo_optim.snapshots import Replayed, capture, restore
        >>> env = Replayed(lambda: gym.make("CartPole-v1"))
        >>> observation, info = env.reset(seed=0)
        >>> snapshot = capture(env)
        >>> first = env.step(1)[0]
        >>> restore(env, snapshot)
        >>> bool((env.step(1)[0] == first).all())
        True
    """

    def __init__(self, make: Callable[[], gym.Env[Any, Any]]) -> None:
        super().__init__(make())
        self.action_space, self.observation_space = (
            self.env.action_space,
            self.env.observation_space,
        )
        self.journal = Journal(self, make)

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[Any, dict[str, Any]]:
        """Begin an episode in a new environment."""
        own = int(self.env.unwrapped.np_random.integers(2**31)) if seed is None else seed
        return self.journal.begin(own, options)

    def step(self, action: Any) -> tuple[Any, Any, bool, bool, dict[str, Any]]:
        """Take a step and record it."""
        result = self.env.step(action)
        self.journal.note(action, result[0])
        return result


class Journal:
    """What happened to a replayed environment since its episode began.

    Args:
        owner: Whose episodes these are.
        make: Returns a new environment.
    """

    def __init__(self, owner: Replayed, make: Callable[[], gym.Env[Any, Any]]) -> None:
        self._owner, self._make = owner, make
        self._seed: int | None = None
        self._options: dict[str, Any] | None = None
        self._actions: list[Any] = []
        self._observation: Any = None

    def begin(self, seed: int, options: dict[str, Any] | None) -> tuple[Any, dict[str, Any]]:
        """Begin an episode in a new environment."""
        self._owner.env.close()
        self._owner.env = self._make()
        observation, info = self._owner.env.reset(seed=seed, options=options)
        self._seed, self._options, self._actions = seed, options, []
        self._observation = copy.deepcopy(observation)
        return observation, info

    def note(self, action: Any, observation: Any) -> None:
        """Add a step."""
        self._actions.append(copy.deepcopy(action))
        self._observation = copy.deepcopy(observation)

    def capture(self) -> Any:
        """Return the journal's contents.

        Raises:
            TrustRegionError: If no episode has begun.
        """
        if self._seed is None:
            raise TrustRegionError("No episode has begun. Call reset() before capture().")
        return self._seed, copy.deepcopy(self._options), list(self._actions), self._place()

    def restore(self, saved: Any) -> None:
        """Play a captured episode again.

        Raises:
            TrustRegionError: If it ends with another observation or random state.
        """
        seed, options, actions, place = saved
        self.begin(seed, copy.deepcopy(options))
        for action in actions:
            self.note(action, self._owner.env.step(action)[0])
        ours, theirs = map(_bits, (self._place(), place))
        if not data_equivalence(ours, theirs, exact=True):
            raise TrustRegionError(
                f"{self._owner.env} did not return to its state when its {len(actions)} actions "
                "were replayed from its seed. It has random numbers that reset(seed=...) does not "
                "set, remembers other episodes, or was changed by other means than steps. Reset "
                "it, and use another environment."
            )

    def _place(self) -> tuple[Any, Any]:
        """Return the last observation, and the state of the generator."""
        return self._observation, self._owner.env.unwrapped.np_random.bit_generator.state


def _bits(value: Any) -> Any:
    """Return whole numbers for floating-point ones, so that NaN is equal to itself."""
    if isinstance(value, Mapping):
        return {name: _bits(each) for name, each in value.items()}
    if isinstance(value, tuple | list):
        return tuple(map(_bits, value))
    if isinstance(value, np.ndarray | np.floating) and value.dtype.itemsize in (2, 4, 8):
        return value.view(f"u{value.dtype.itemsize}") if value.dtype.kind == "f" else value
    return value
