"""Single path, the paper's first sampling scheme: trajectories of the policy, as they come."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from gymnasium.vector import AutoresetMode, VectorEnv
from torch import Tensor

from trpo_optim.distributions import sample
from trpo_optim.report import TrustRegionError
from trpo_optim.rollouts.spaces import (
    actions_for,
    mapped,
    one_of,
    require_known,
    stacked,
    tensors_of,
)

__all__ = ["Cursor", "RolloutError", "SinglePathBatch", "single_path"]

_Array = np.ndarray[Any, Any]


@dataclass
class Cursor:
    """Where a rollout stands, so that the next one can go on from there; it can be pickled.

    Attributes:
        observations: The environments' last ones, as they returned them.
        state: The policy's recurrent state, or None.
        starts: Where an episode begins with these observations, shape (N,).
        resetting: Where the next step only resets (``AutoresetMode.NEXT_STEP``), shape (N,).
        returns: The sums of rewards of the episodes in progress, shape (N,).
        lengths: Their steps, shape (N,).
    """

    observations: Any
    state: Any
    starts: _Array
    resetting: _Array
    returns: _Array
    lengths: _Array


@dataclass(frozen=True, eq=False)
class SinglePathBatch:
    """T steps of N environments, time first; a row is one step of one of them.

    Attributes:
        observations: What the policy saw, (T, N, …), in the space's form.
        actions: What it drew, (T, N, …), before clipping.
        rewards: Shape (T, N).
        terminated: True where the episode ended with the step for good, (T, N).
        truncated: True where it was cut off after the step, by a time limit say, (T, N).
        starts: True where an episode begins, (T, N).
        valid: False where a row is none, (T, N): a reset, or beyond the episodes asked for.
        cut_observations: What followed each row after which the batch does not go on, though the
            episode did not terminate, (K, …).
        cut_rows: Their places (t, n), shape (K, 2).
        state: The policy's recurrent state before the first row, or None.
        episode_returns: Undiscounted returns of the episodes that ended in the batch, in order.
        episode_lengths: Their lengths in steps.
        end: Where the next rollout goes on.
    """

    observations: Any
    actions: Any
    rewards: Tensor
    terminated: Tensor
    truncated: Tensor
    starts: Tensor
    valid: Tensor
    cut_observations: Any
    cut_rows: Tensor
    state: Any
    episode_returns: list[float]
    episode_lengths: list[int]
    end: Cursor

    @property
    def ends(self) -> Tensor:
        """True where what follows a row is not the next one, (T, N)."""
        ends = self.terminated | self.truncated
        ends[-1] = True
        if len(self.cut_rows):
            ends[self.cut_rows[:, 0], self.cut_rows[:, 1]] = True
        return ends

    def flat(self, values: Any) -> Any:
        """Return the valid rows, (B, …), of tensors of shape (T, N, …)."""
        return mapped(lambda each: each[self.valid], values)

    @torch.no_grad()
    def values(self, critic: Callable[[Any], Tensor]) -> tuple[Tensor, Tensor]:
        """Return the critic's values of every row and of what followed it.

        Where the episode terminated nothing follows, which is worth 0; where it was truncated, or
        the batch ends, the last observation is.

        Args:
            critic: From observations (B, …) to values, (B,) or (B, 1).

        Returns:
            V(sₜ) and V(sₜ₊₁), both (T, N).
        """
        steps, envs = self.rewards.shape
        rows = mapped(lambda each: each.flatten(0, 1), self.observations)
        values = critic(rows).reshape(steps, envs)
        following = torch.cat([values[1:], torch.zeros_like(values[:1])])
        if len(self.cut_rows):
            cut = critic(self.cut_observations).reshape(-1)
            following[self.cut_rows[:, 0], self.cut_rows[:, 1]] = cut
        return values, following.masked_fill(self.terminated, 0.0)


class RolloutError(RuntimeError):
    """An environment failed in mid-rollout.

    Attributes:
        batch: What had been collected by then, of the kind that was asked for, or None where that
            was nothing.
    """

    def __init__(self, message: str, batch: Any) -> None:
        super().__init__(message)
        self.batch = batch


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
        state: The initial recurrent state of a policy that has one.
        seed: Of the reset.
        device: Where the policy lives.
        before_step: Called before every step with its number and where the rollout stands.

    Returns:
        The batch.

    Raises:
        TrustRegionError: If the arguments do not fit, or a space is not known.
        RolloutError: If an environment raises, or returns a reward that is no number; it holds the
            batch up to there.
    """
    if (steps is None) == (episodes is None):
        raise TrustRegionError("Give either steps or episodes to single_path().")
    for name, value in (("steps", steps), ("episodes", episodes)):
        if value is not None and value < 1:
            raise TrustRegionError(f"{name} is {value!r}; it must be a whole number of at least 1.")
    if after is not None and (episodes is not None or state is not None or seed is not None):
        raise TrustRegionError(
            "after goes on from another rollout; whole episodes, an initial state and a seed "
            "belong to a fresh start. Leave one of them out."
        )
    require_known(envs.single_observation_space, "observations")
    require_known(envs.single_action_space, "actions")
    if isinstance(after, SinglePathBatch):
        after = after.end
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
        lasts = info.get("final_obs") if self.mode is AutoresetMode.SAME_STEP else following
        for index in np.flatnonzero(done & valid & ~terminated):
            self.cuts.append((len(self.rewards), int(index), one_of(lasts, int(index))))
        self.observations.append(seen)
        self.actions.append(actions)
        self.rewards.append(np.array(rewards))
        self.terminated.append(done & valid & terminated)
        self.truncated.append(done & valid & ~terminated)
        self.starts.append(cursor.starts & valid)
        self.valid.append(valid)
        returns, lengths = cursor.returns + rewards, cursor.lengths + 1
        for index in np.flatnonzero(done & valid):
            self.episodes.append((float(returns[index]), int(lengths[index])))
        if self.quotas is not None:
            self.quotas -= done & valid
        if self.mode is AutoresetMode.DISABLED and done.any():
            following, _ = envs.reset(options={"reset_mask": done})
        later = self.mode is AutoresetMode.NEXT_STEP
        self.cursor = Cursor(
            observations=following,
            state=state,
            starts=cursor.resetting if later else done,
            resetting=done if later else np.zeros_like(done),
            returns=np.where(done | cursor.resetting, 0.0, returns),
            lengths=np.where(done | cursor.resetting, 0, lengths),
        )

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
            end=self.cursor,
        )


def _drawn(dist: Any) -> Any:
    """Return actions of a distribution, or what are actions already."""
    return mapped(lambda each: each if isinstance(each, Tensor) else sample(each), dist)
