"""Single path, the paper's first sampling scheme: trajectories of the policy, as they come."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from gymnasium.vector import AutoresetMode, VectorEnv
from torch import Tensor

from trpo_optim.distributions import sample
from trpo_optim.distributions.nesting import mapped
from trpo_optim.errors import RolloutError, TrustRegionError
from trpo_optim.rollouts.arguments import require_counts
from trpo_optim.rollouts.spaces import (
    actions_for,
    one_of,
    require_known,
    stacked,
    tensors_of,
)
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
    seed: int | None = None,
    device: torch.device | str = "cpu",
    before_step: Callable[[int, Cursor], None] | None = None,
) -> SinglePathBatch:
    """Let a policy act, and return what happened.

    Args:
        envs: Vector environments, in any autoreset mode, of Box, Discrete, MultiDiscrete and
            MultiBinary spaces and tuples and dicts of these.
        policy: From observations (N, …) to what ``trpo_optim.sample`` draws from, or to actions
            themselves, tensors, which are taken as they are. With ``state``, from observations
            (1, N, …), the state and where an episode starts, (1, N), to a distribution of batch
            shape (1, N) and the next state.
        steps: How many steps each environment takes. With ``AutoresetMode.NEXT_STEP`` a reset
            takes one, whose row is not valid.
        episodes: Instead: how many whole episodes, split evenly between the environments, since
            the first to end would be the short ones.
        after: The rollout, or its ``end``, that this one goes on from. None: the environments are
            reset.
        state: The initial recurrent state of a policy that has one: a tensor, or a dict or tuple
            of such, with the environments as second dimension.
        seed: Of the reset; the i-th environment's is ``seed + i``.
        device: Where the policy lives.
        before_step: Called before every step with its number and where the rollout stands.

    Returns:
        The batch.

    Raises:
        TrustRegionError: If the arguments do not fit, or a space is not known.
        RolloutError: If an environment raises: its batch holds what came before. Or if one returns
            a reward that is no number: its batch holds all steps.
    """
    if not isinstance(envs, VectorEnv):
        raise TrustRegionError(
            f"single_path() got a {type(envs).__name__}; it takes vector environments. Make them "
            "by gymnasium.make_vec, or put one into gymnasium.vector.SyncVectorEnv([lambda: env])."
        )
    if (steps is None) == (episodes is None):
        raise TrustRegionError("Give either steps or episodes to single_path().")
    require_counts(steps=steps, episodes=episodes)
    if after is not None and (episodes is not None or state is not None or seed is not None):
        raise TrustRegionError(
            "after goes on from another rollout; whole episodes, an initial state and a seed "
            "belong to a fresh start. Leave one of them out."
        )
    require_known(envs.single_observation_space, "observations")
    require_known(envs.single_action_space, "actions")
    if isinstance(after, SinglePathBatch):
        after = after.end
    if after is not None and len(after.starts) != envs.num_envs:
        raise TrustRegionError(
            f"after is a rollout of {len(after.starts)} environments, and there are "
            f"{envs.num_envs} here. Go on with the same ones."
        )
    _require_state(state, envs.num_envs)
    cursor = _fresh(envs, state, seed) if after is None else after
    path = _Path(envs, policy, cursor, device, _quotas(episodes, envs.num_envs))
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


def _fresh(envs: VectorEnv[Any, Any, Any], state: Any, seed: int | None) -> Cursor:
    count = envs.num_envs
    return Cursor(
        observations=envs.reset(seed=seed)[0],
        state=state,
        starts=np.ones(count, dtype=bool),
        resetting=np.zeros(count, dtype=bool),
        returns=np.zeros(count),
        lengths=np.zeros(count, dtype=np.int64),
    )


def _require_state(state: Any, count: int) -> None:
    """Check that a recurrent state has the environments as its second dimension."""

    def check(each: Tensor) -> None:
        if each.dim() < 2 or each.shape[1] != count:
            raise TrustRegionError(
                f"state holds a tensor of shape {tuple(each.shape)}; its second dimension must be "
                f"the {count} environments, as torch.nn's recurrences have it: (layers, N, …)."
            )

    if state is not None:
        mapped(check, state)


def _quotas(episodes: int | None, count: int) -> _Array | None:
    """Return how many episodes each environment gives."""
    if episodes is None:
        return None
    return np.array([episodes // count + (index < episodes % count) for index in range(count)])


@dataclass
class _Path:
    """A rollout in the making; lists hold one entry a step."""

    envs: VectorEnv[Any, Any, Any]
    policy: Callable[..., Any]
    cursor: Cursor
    device: torch.device | str
    quotas: _Array | None
    observations: list[Any] = field(default_factory=list)
    actions: list[Any] = field(default_factory=list)
    rewards: list[_Array] = field(default_factory=list)
    terminated: list[_Array] = field(default_factory=list)
    truncated: list[_Array] = field(default_factory=list)
    starts: list[_Array] = field(default_factory=list)
    valid: list[_Array] = field(default_factory=list)
    cuts: list[tuple[int, int, Any]] = field(default_factory=list)
    episodes: list[tuple[float, int]] = field(default_factory=list)

    def __post_init__(self) -> None:
        """Note how episodes restart, and what the rollout begins with."""
        mode = self.envs.metadata.get("autoreset_mode", AutoresetMode.NEXT_STEP)
        self.mode = AutoresetMode(mode)
        self.state = self.cursor.state

    @property
    def owes_episodes(self) -> bool:
        """Whether an environment owes episodes."""
        return self.quotas is not None and bool((self.quotas > 0).any())

    def advance(self) -> None:
        """Take one step of all environments."""
        cursor, envs = self.cursor, self.envs
        seen = tensors_of(cursor.observations, self.device)
        actions, state = self._act(seen)
        following, rewards, terminated, truncated, info = envs.step(
            actions_for(envs.single_action_space, actions)
        )
        done = (terminated | truncated) & ~cursor.resetting
        valid = ~cursor.resetting if self.quotas is None else ~cursor.resetting & (self.quotas > 0)
        ended = done & valid
        returns, lengths = cursor.returns + rewards, cursor.lengths + 1
        lasts = info.get("final_obs") if self.mode is AutoresetMode.SAME_STEP else following
        for index in map(int, ended.nonzero()[0]):
            self.episodes.append((float(returns[index]), int(lengths[index])))
            if not terminated[index]:
                self.cuts.append((len(self.rewards), index, one_of(lasts, index)))
        self.observations.append(seen)
        self.actions.append(actions)
        self.rewards.append(np.array(rewards))
        self.terminated.append(ended & terminated)
        self.truncated.append(ended & ~terminated)
        self.starts.append(cursor.starts & valid)
        self.valid.append(valid)
        if self.quotas is not None:
            self.quotas -= ended
        returns[done | cursor.resetting] = 0.0
        lengths[done | cursor.resetting] = 0
        later = self.mode is AutoresetMode.NEXT_STEP
        self.cursor = Cursor(
            observations=following,
            state=state,
            starts=cursor.resetting if later else done,
            resetting=done if later else cursor.resetting,
            returns=returns,
            lengths=lengths,
        )
        if self.mode is AutoresetMode.DISABLED and done.any():
            self.cursor.observations, _ = envs.reset(options={"reset_mask": done})

    def _act(self, seen: Any) -> tuple[Any, Any]:
        """Return actions and the policy's next recurrent state."""
        state = self.cursor.state
        if state is None:
            return _drawn(self.policy(seen)), None
        starts = torch.as_tensor(self.cursor.starts, device=self.device)[None]
        dist, state = self.policy(mapped(lambda each: each[None], seen), state, starts)
        return mapped(lambda each: each[0], _drawn(dist)), state

    def batch(self) -> SinglePathBatch:
        """Return what has been collected."""
        last, open_ended = len(self.rewards) - 1, self.valid[-1]
        open_ended = open_ended & ~self.terminated[-1] & ~self.truncated[-1]
        for index in np.flatnonzero(open_ended):
            following = one_of(self.cursor.observations, int(index))
            self.cuts.append((last, int(index), following))
        cut_observations = (
            stacked([each for _, _, each in self.cuts])
            if self.cuts
            else mapped(lambda each: each[:0].cpu().numpy(), self.observations[0])
        )

        def tensor(steps: list[_Array], kind: torch.dtype = torch.bool) -> Tensor:
            return torch.as_tensor(np.stack(steps), dtype=kind, device=self.device)

        rows = [(step, env) for step, env, _ in self.cuts]
        return SinglePathBatch(
            observations=stacked(self.observations),
            actions=stacked(self.actions),
            rewards=tensor(self.rewards, torch.get_default_dtype()),
            terminated=tensor(self.terminated),
            truncated=tensor(self.truncated),
            starts=tensor(self.starts),
            valid=tensor(self.valid),
            cut_observations=tensors_of(cut_observations, self.device),
            cut_rows=torch.tensor(rows, dtype=torch.long, device=self.device).reshape(-1, 2),
            state=self.state,
            episode_returns=[value for value, _ in self.episodes],
            episode_lengths=[length for _, length in self.episodes],
            end=replace(self.cursor, observations=mapped(np.array, self.cursor.observations)),
        )


def _drawn(dist: Any) -> Any:
    """Return actions of a distribution, or what are actions already."""
    return mapped(lambda each: each if isinstance(each, Tensor) else sample(each), dist)
