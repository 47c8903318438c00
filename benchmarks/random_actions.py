"""What actions drawn alike come to: the floor that scores are counted from."""

from __future__ import annotations

import torch
from gymnasium.vector import SyncVectorEnv

from trpo_optim.rollouts import single_path


def returns_at_random(envs: SyncVectorEnv, episodes: int, seed: int) -> list[float]:
    """Return the returns of whole episodes; the environments are closed.

    Args:
        envs: The environments.
        episodes: How many.
        seed: Of the actions, and 10 000 more of the resets.

    Returns:
        One number an episode.
    """
    envs.action_space.seed(seed)
    batch = single_path(
        envs,
        lambda _: torch.as_tensor(envs.action_space.sample()),
        episodes=episodes,
        seed=10_000 + seed,
    )
    envs.close()
    return batch.episode_returns
