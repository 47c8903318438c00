"""A rollout in the making: steps of all environments, and what has been collected of them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from gymnasium.vector import AutoresetMode, VectorEnv
from torch import Tensor
from torch.distributions import Distribution

from trpo_optim.distributions import sample
from trpo_optim.distributions.nesting import mapped
from trpo_optim.errors import TrustRegionError
from trpo_optim.rollouts.autoreset import last_observation
from trpo_optim.rollouts.infos import updated
from trpo_optim.rollouts.kept_log_probs import KeptLogProbs
from trpo_optim.rollouts.spaces import (
    actions_for,
    array_of,
    copies_of,
    evaluated,
    in_form_of,
    one_of,
    require_form,
    require_state,
    stacked,
    tensors_of,
)
from trpo_optim.rollouts.trajectories import Cursor, SinglePathBatch

__all__ = ["Path"]

_Array = np.ndarray[Any, Any]


@dataclass
class Path:
    """A rollout in the making; lists hold one entry a step."""

    envs: VectorEnv[Any, Any, Any]
    policy: Callable[..., Any]
    cursor: Cursor
    device: torch.device | str
    quotas: _Array | None
    mode: AutoresetMode
    observations: list[Any] = field(default_factory=list)
    said: list[dict[str, Any]] = field(default_factory=list)
    actions: list[Any] = field(default_factory=list)
    rewards: list[_Array] = field(default_factory=list)
    terminated: list[_Array] = field(default_factory=list)
    truncated: list[_Array] = field(default_factory=list)
    starts: list[_Array] = field(default_factory=list)
    valid: list[_Array] = field(default_factory=list)
    cuts: list[tuple[int, int, Any]] = field(default_factory=list)
    episodes: list[tuple[float, int]] = field(default_factory=list)

    def __post_init__(self) -> None:
        """Note what the rollout begins with."""
        self.state = copies_of(self.cursor.state)  # the caller may write to it
        self.log_probs = KeptLogProbs(recurrent=self.state is not None)

    @property
    def owes_episodes(self) -> bool:
        """Whether an environment owes episodes."""
        return self.quotas is not None and bool((self.quotas > 0).any())

    def advance(self) -> None:
        """Take one step of all environments."""
        cursor, envs = self.cursor, self.envs
        seen = tensors_of(cursor.observations, self.device)
        said = tensors_of(cursor.info or {}, self.device)
        actions, state = self._act(seen, said)
        taken = actions_for(envs.single_action_space, actions)
        following, *numbers, info = envs.step(in_form_of(cursor.observations, taken))
        rewards, terminated, truncated = map(self._column, numbers, (float, bool, bool))
        done = (terminated | truncated) & ~cursor.resetting
        valid = ~cursor.resetting if self.quotas is None else ~cursor.resetting & (self.quotas > 0)
        ended = done & valid
        returns, lengths = cursor.returns + rewards, cursor.lengths + 1
        for index in map(int, ended.nonzero()[0]):
            self.episodes.append((float(returns[index]), int(lengths[index])))
            if not terminated[index]:
                last = last_observation(self.mode, following, info, index)
                self.cuts.append((len(self.rewards), index, last))
        self.observations.append(seen)
        self.said.append(said)
        self.actions.append(actions)
        self.rewards.append(rewards)
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
            info=cursor.info,
        )
        # At an episode's end no action is legal, unless the next one has begun in the same step.
        self._hear(info, ~done | (self.mode is AutoresetMode.SAME_STEP))
        if self.mode is AutoresetMode.DISABLED and done.any():
            self.cursor.observations, info = envs.reset(options={"reset_mask": done})
            self._hear(info, done)

    def _hear(self, info: Any, rows: _Array) -> None:
        """Note what some environments say beside their observations."""
        if self.cursor.info:
            self.cursor.info = updated(self.cursor.info, self.cursor.info, info, rows)

    def _column(self, values: Any, kind: type) -> _Array:
        """Return one number of every environment."""
        column: _Array = array_of(values).astype(kind, copy=False)
        if column.shape != (self.envs.num_envs,):
            raise TrustRegionError(
                f"The environments returned rewards or ends of shape {column.shape}; it must be "
                f"({self.envs.num_envs},), one number per environment. Reshape them in a wrapper."
            )
        return column

    def _act(self, seen: Any, said: dict[str, Any]) -> tuple[Any, Any]:
        """Return actions and the policy's next recurrent state."""
        state = self.cursor.state
        if state is None:
            return self._drawn(evaluated(self.policy, seen, info=said)), None
        starts = torch.as_tensor(self.cursor.starts, device=self.device)[None]
        seen, said = mapped(lambda each: each[None], (seen, said))
        returned = evaluated(self.policy, seen, state, starts, info=said)
        if not (isinstance(returned, tuple | list) and len(returned) == 2):
            several = isinstance(returned, tuple | list)
            given = f"{len(returned)} values" if several else "one value"
            raise TrustRegionError(
                f"The recurrent policy returned {given} ({type(returned).__name__}). With state=, "
                "return (distribution, next state)."
            )
        dist, state = returned
        if isinstance(state, Distribution):
            raise TrustRegionError(
                "The recurrent policy returned a distribution in second place. Return "
                "(distribution, next state), in this order."
            )
        require_state(state, self.envs.num_envs, "The recurrent policy's next state")
        return mapped(lambda each: each[0], self._drawn(dist)), state

    def _drawn(self, dist: Any) -> Any:
        """Return actions of a distribution, or what are actions already."""
        require_form(self.envs.single_action_space, dist)
        actions = mapped(
            lambda each: each.clone() if isinstance(each, Tensor) else sample(each), dist
        )
        mapped(self._require_rows, actions)
        self.log_probs.add(dist, actions)
        return actions

    def _require_rows(self, actions: Tensor) -> None:
        """Check that there is one action of every environment."""
        count = self.envs.num_envs
        rows: tuple[int, ...] = (count,)
        called = f"(N, …) with N = {count}"
        if self.state is not None:
            rows = (1, count)
            called = f"(1, N, …) with N = {count}, since state= is given"
        if actions.shape[: len(rows)] != rows:
            raise TrustRegionError(
                f"The policy's actions have shape {tuple(actions.shape)}, and there are {count} "
                f"environments. Return a distribution whose actions have shape {called}."
            )

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
            else mapped(lambda each: array_of(each[:0]), self.observations[0])
        )

        def tensor(steps: list[_Array], kind: torch.dtype = torch.bool) -> Tensor:
            return torch.as_tensor(np.stack(steps), dtype=kind, device=self.device)

        logs = self.log_probs.steps()
        if logs is not None:
            logs = logs[: len(self.rewards)]  # there is one more if a step failed
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
            end=replace(
                self.cursor,
                observations=copies_of(self.cursor.observations),
                state=copies_of(self.cursor.state),
            ),
            info=stacked(self.said),
            log_prob=logs,
        )
