"""How runs are judged: whole episodes, in environments and from starts of their own."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from gymnasium.vector import SyncVectorEnv
from torch import Tensor

from trpo_optim.rollouts import single_path

EPISODES = 20
"""Episodes of an evaluation, of each kind."""


def first_start(seed: int) -> int:
    """Return the seed of the first environment that a run is judged in; the next has one more.

    Far enough apart that runs of other seeds are judged from other starts.
    """
    return 10_000 + 1_000 * seed


def returns_of(
    envs: SyncVectorEnv, act: Callable[[Tensor], Any], seed: int, device: str = "cpu"
) -> dict[str, list[float]]:
    """Return a policy's returns, sampled and by its likeliest actions: one number an episode.

    The environments are closed.
    """
    policies = {"sampled": act, "deterministic": lambda seen: act(seen).mode}
    returns = {name: _returns(envs, policy, seed, device) for name, policy in policies.items()}
    envs.close()
    return returns


def returns_at_random(envs: SyncVectorEnv, seed: int) -> list[float]:
    """Return the returns of uniformly random actions; the environments are closed."""
    envs.action_space.seed(seed)
    returns = _returns(envs, lambda _: torch.as_tensor(envs.action_space.sample()), seed, "cpu")
    envs.close()
    return returns


def _returns(
    envs: SyncVectorEnv, policy: Callable[[Tensor], Any], seed: int, device: str
) -> list[float]:
    start = first_start(seed)
    batch = single_path(envs, policy, episodes=EPISODES, seed=start, device=device)
    return batch.episode_returns
