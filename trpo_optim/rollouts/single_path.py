"""Single path, the paper's first sampling scheme: trajectories of the policy."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from gymnasium.vector import VectorEnv

from trpo_optim.distributions.arguments import require_counts
from trpo_optim.errors import RolloutError, TrustRegionError
from trpo_optim.rollouts.autoreset import mode_of
from trpo_optim.rollouts.infos import names_of, updated
from trpo_optim.rollouts.path import Path
from trpo_optim.rollouts.spaces import require_known, require_state
from trpo_optim.rollouts.trajectories import Cursor, SinglePathBatch

__all__ = ["single_path"]

_Array = np.ndarray[Any, Any]


@torch.no_grad()
def single_path(
    envs: VectorEnv[Any, Any, Any],
    policy: Callable[..., Any],
    *,
    steps: int | None = None,
    episodes: int | None = None,
    after: SinglePathBatch | Cursor | None = None,
    state: Any = None,
    info: str | Sequence[str] = (),
    seed: int | None = None,
    device: torch.device | str = "cpu",
    before_step: Callable[[int, Cursor], None] | None = None,
) -> SinglePathBatch:
    """Collect trajectories of a policy.

    Args:
        envs: Vector environments in any autoreset mode, with Box, Discrete, MultiDiscrete and
            MultiBinary spaces, and Tuples and Dicts of these. They may return arrays or tensors,
            and take actions in the same form.
        policy: A function from observations (N, …) to a distribution, or a dict or tuple of
            distributions. It may also return actions themselves, as tensors. With ``state``, its
            arguments are observations (1, N, …), the state and where an episode starts, (1, N). It
            then returns a distribution with batch shape (1, N) and the next state.
        steps: The number of steps of each environment. With ``AutoresetMode.NEXT_STEP``, a reset
            takes one step, and its row is not valid.
        episodes: In place of ``steps``: the number of whole episodes. They are split evenly between
            the environments, since the first episodes to end would be the short ones.
        after: The rollout, or its ``end``, that this one goes on from. None: the environments are
            reset.
        state: The initial state of a recurrent policy: a tensor, or a dict or tuple of tensors,
            with the environments as second dimension.
        info: Names of entries in the environments' info, such as ``"action_mask"``. The policy gets
            them as keyword arguments (N, …), and the batch keeps them.
        seed: The seed of the reset. The i-th environment gets ``seed + i``.
        device: The device of the policy.
        before_step: A function that is called before every step, with the step's number and the
            ``Cursor``.

    Returns:
        The batch.

    Raises:
        TrustRegionError: If the arguments do not fit, a space is not supported, the autoreset mode
            of the environments is not known, or an info lacks an entry.
        RolloutError: If an environment raises; the error's batch holds the steps before. Also if a
            reward is NaN or infinite; the error's batch holds all steps.

    Example:
        >>> import gymnasium as gym, torch
        >>> from torch.distributions import Categorical
        >>> from trpo_optim.rollouts import single_path
        >>> envs = gym.make_vec("CartPole-v1", num_envs=2, vectorization_mode="sync")
        >>> network = torch.nn.Linear(4, 2)
        >>> policy = lambda observations: Categorical(logits=network(observations))
        >>> batch = single_path(envs, policy, steps=8, seed=0)
        >>> batch = single_path(envs, policy, steps=8, after=batch)  # goes on
        >>> batch.actions.shape
        torch.Size([8, 2])
    """
    if not isinstance(envs, VectorEnv):
        raise TrustRegionError(
            f"single_path() got a {type(envs).__name__}; it takes vector environments. Make them "
            "by gymnasium.make_vec, or put one into gymnasium.vector.SyncVectorEnv([lambda: env])."
        )
    if (steps is None) == (episodes is None):
        raise TrustRegionError("single_path() needs either steps or episodes. Pass one of the two.")
    require_counts(steps=steps, episodes=episodes)
    if after is not None and (episodes is not None or state is not None or seed is not None):
        raise TrustRegionError(
            "after continues another rollout, while episodes, state and seed need a fresh start. "
            "Pass either after or these."
        )
    require_known(envs.single_observation_space, "observations")
    require_known(envs.single_action_space, "actions")
    mode, names = mode_of(envs), names_of(info)
    if isinstance(after, SinglePathBatch):
        after = after.end
    if after is not None and len(after.starts) != envs.num_envs:
        raise TrustRegionError(
            f"after is a rollout of {len(after.starts)} environments, and envs has "
            f"{envs.num_envs}. Pass the same environments."
        )
    if after is not None and set(names) != set(after.info or ()):
        raise TrustRegionError(
            f"info names {list(names)}, and after has {list(after.info or ())}. Pass the same "
            "names to every rollout."
        )
    if state is not None:
        require_state(state, envs.num_envs, "state")
    cursor = _fresh(envs, state, names, seed) if after is None else after
    path = Path(envs, policy, cursor, device, _quotas(episodes, envs.num_envs), mode)
    try:
        while path.owes_episodes if steps is None else len(path.rewards) < steps:
            if before_step is not None:
                before_step(len(path.rewards), path.cursor)
            path.advance()
    except TrustRegionError:
        raise
    except Exception as error:
        raise RolloutError(
            f"Step {len(path.rewards)} of the rollout failed ({type(error).__name__}: {error}). "
            "What came before is this error's batch.",
            path.batch() if path.rewards else None,
        ) from error
    batch = path.batch()
    bad = (~batch.rewards.isfinite() & batch.valid).nonzero()
    if len(bad):
        step, env = bad[0].tolist()
        raise RolloutError(
            f"Environment {env} returned the reward {float(batch.rewards[step, env])} at step "
            f"{step}. Look at the environment, or at the actions that the policy drew.",
            batch,
        )
    return batch


def _fresh(
    envs: VectorEnv[Any, Any, Any], state: Any, names: tuple[str, ...], seed: int | None
) -> Cursor:
    count = envs.num_envs
    observations, info = envs.reset(seed=seed)
    said = updated(names, None, info, np.ones(count, dtype=bool)) if names else None
    return Cursor(
        observations=observations,
        state=state,
        starts=np.ones(count, dtype=bool),
        resetting=np.zeros(count, dtype=bool),
        returns=np.zeros(count),
        lengths=np.zeros(count, dtype=np.int64),
        info=said,
    )


def _quotas(episodes: int | None, count: int) -> _Array | None:
    """Return how many episodes each environment gives."""
    if episodes is None:
        return None
    return np.array([episodes // count + (index < episodes % count) for index in range(count)])
