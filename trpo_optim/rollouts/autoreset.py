"""How vector environments begin a new episode, and where they say how the last one ended."""

from __future__ import annotations

from typing import Any

from gymnasium.vector import AutoresetMode, VectorEnv

from trpo_optim.errors import TrustRegionError
from trpo_optim.rollouts.infos import entry_of
from trpo_optim.rollouts.spaces import one_of

__all__ = ["last_observation", "mode_of"]


def mode_of(envs: VectorEnv[Any, Any, Any]) -> AutoresetMode:
    """Return how vector environments begin a new episode.

    Args:
        envs: The environments.

    Returns:
        The mode in their metadata.

    Raises:
        TrustRegionError: If there is none, or it is not known.
    """
    mode = (envs.metadata or {}).get("autoreset_mode")
    try:
        return AutoresetMode(mode)
    except ValueError:
        given = "missing" if mode is None else repr(mode)
        raise TrustRegionError(
            f"metadata['autoreset_mode'] of {envs} is {given}. It must be one of "
            f"{', '.join(map(str, AutoresetMode))}: it says which rows only reset, and where the "
            "last observation of an episode is. Set the mode of these environments, for example "
            "envs.metadata = {**envs.metadata, 'autoreset_mode': AutoresetMode.NEXT_STEP}, with "
            "gymnasium.vector.AutoresetMode."
        ) from None


def last_observation(mode: AutoresetMode, following: Any, info: Any, index: int) -> Any:
    """Return a copy of the last observation of an episode that has just ended.

    Args:
        mode: How the environments begin a new episode.
        following: The observations that the step returned, (N, …).
        info: What the step returned beside them.
        index: Which environment's episode has ended.

    Returns:
        The observation.

    Raises:
        TrustRegionError: If a new episode has begun, and the last observation was not kept.
    """
    if mode is not AutoresetMode.SAME_STEP:
        return one_of(following, index)
    last = entry_of(info, "final_obs", index)
    if last is None:
        raise TrustRegionError(
            f"The episode of environment {index} was truncated, and its info has no 'final_obs'. "
            "With AutoresetMode.SAME_STEP, info['final_obs'] must hold the last observation for "
            "bootstrapping. Use AutoresetMode.NEXT_STEP or DISABLED, or put the wrapper that drops "
            "it inside the vector environment."
        )
    return last
