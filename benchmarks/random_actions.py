"""What actions drawn alike come to: the floor that scores are counted from."""

from __future__ import annotations

import torch
from gymnasium.vector import SyncVectorEnv

from trpo_optim.rollouts import single_path


def first_start(seed: int) -> int:
    """Return the seed of the first environment that a run is judged in; the next has one more.

    Far enough apart that runs of other seeds are judged from other starts.
    """
    return 10_000 + 1_000 * seed


def returns_at_random(envs: SyncVectorEnv, episodes: int, seed: int) -> list[float]:
    """Return the returns of whole episodes; the environments are closed.

    Args:
        envs: The environments.
        episodes: How many.
        seed: Of the run.

    Returns:
        One number an episode.
    """
    envs.action_space.seed(seed)
    batch = single_path(
        envs,
        lambda _: torch.as_tensor(envs.action_space.sample()),
        episodes=episodes,
        seed=first_start(seed),
    )
    envs.close()
    return batch.episode_returns
