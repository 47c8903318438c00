"""Vine, the paper's second sampling scheme: several actions tried from the same states."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import accumulate
from typing import Any, Literal

import gymnasium as gym
import numpy as np
import torch
from gymnasium.vector import SyncVectorEnv
from torch import Tensor

from trpo_optim.distributions.nesting import mapped
from trpo_optim.errors import RolloutError, TrustRegionError
from trpo_optim.rollouts.arguments import require_counts, require_shares
from trpo_optim.rollouts.branch_actions import branch_actions
from trpo_optim.rollouts.branches import Branches, State
from trpo_optim.rollouts.single_path import single_path
from trpo_optim.rollouts.spaces import one_of, stacked, tensors_of
from trpo_optim.rollouts.trajectories import Cursor, SinglePathBatch
from trpo_optim.snapshots.snapshot import capture, restore

__all__ = ["VineBatch", "vine"]

Rule = Callable[[int, Cursor], "np.ndarray[Any, Any]"]
"""From a step's number and where the trunk stands to which environments' states are taken, (N,)."""


@dataclass(frozen=True, eq=False)
class VineBatch:
    """S states of the trunk, K actions tried from each.

    Attributes:
        trunk: The trajectories that the states were taken from.
        observations: Of the rollout set, (S, …).
        actions: Shape (S, K, …).
        q: Estimates of Q(s, a), shape (S, K). Where all actions are tried, NaN for those that the
            policy rules out: they are not run.
        sampling_log_prob: ln q(a|s) of the actions, (S, K); None where all actions were tried.
        steps: Simulator steps of trunk and branches together.
        info: What was said beside the observations, (S, …) by name: what ``vine(info=…)`` asked
            for.
    """

    trunk: SinglePathBatch
    observations: Any
    actions: Any
    q: Tensor
    sampling_log_prob: Tensor | None
    steps: int
    info: dict[str, Any] = field(default_factory=dict)


@torch.no_grad()
def vine(
    envs: SyncVectorEnv,
    policy: Callable[..., Any],
    *,
    steps: int,
    states: int | Rule,
    branches: int | None = None,
    sampling: Literal["policy", "uniform"] = "policy",
    horizon: int,
    gamma: float,
    critic: Callable[[Any], Tensor] | None = None,
    common_random_numbers: bool = True,
    after: VineBatch | SinglePathBatch | Cursor | None = None,
    info: str | Sequence[str] = (),
    seed: int | None = None,
    device: torch.device | str = "cpu",
) -> VineBatch:
    """Let a policy act, return to some of the states, and try several actions from each.

    The environments are left where the trunk ended, so that the next call can go on ``after`` it.

    Args:
        envs: Environments whose states can be captured (``capture``), without vector wrappers.
        policy: From observations (N, …) to what ``trpo_optim.sample`` draws from.
        steps: The trunk's steps of each environment.
        states: How many of the trunk's rows to return to the states of, drawn uniformly (those that
            only reset, with ``AutoresetMode.NEXT_STEP``, are passed over); or a rule that says
            which.
        branches: K, how many actions to try from each state, at least 2. None: every action of a
            Discrete space that the policy does not rule out, for the estimator (15).
        sampling: What draws K actions, for the estimator (16): the policy, or all alike that it
            does not rule out.
        horizon: Most steps of a branch, the first action's included.
        gamma: Discount factor γ, in [0, 1].
        critic: What a branch is worth that was cut off, from observations (B, …) to (B,) or
            (B, 1). None: nothing.
        common_random_numbers: Whether the branches of a state meet the same random numbers, in the
            policy's sampling and in the environment, which makes their differences more certain.
            The environment's are those of its ``np_random``; a wrapper's own generator, or an
            emulator's, goes on as it was captured.
        after: The vine or the rollout that this trunk goes on from, or its ``end``. None: the
            environments are reset.
        info: Names in the environments' info, such as ``"action_mask"``: what they hold is passed
            to the policy as keyword arguments, as by ``single_path``.
        seed: Of the reset; the i-th environment's is ``seed + i``.
        device: Where policy and critic live.

    Returns:
        The batch.

    Raises:
        TrustRegionError: If an argument does not fit, or the environments cannot be captured.
        RolloutError: If an environment fails: on a branch, its batch holds the states that were
            finished; on the trunk, it is what ``single_path`` collected.

    Source:
        Schulman et al. (2015), section 5.2; common random numbers: Ng & Jordan, "PEGASUS", 2000.
    """
    _require(
        envs, states=states, branches=branches, sampling=sampling, steps=steps, horizon=horizon
    )
    require_shares(gamma=gamma)
    if isinstance(after, VineBatch):
        after = after.trunk
    chosen: list[State] = []
    rule = states if callable(states) else _uniform(states, steps, envs.num_envs)

    def keep(step: int, cursor: Cursor) -> None:
        wanted = np.asarray(rule(step, cursor))
        if wanted.dtype != bool or wanted.shape != (envs.num_envs,):
            raise TrustRegionError(
                f"The rule returned {wanted!r}; it must be an array of {envs.num_envs} bools, true "
                "for the environments whose states are taken."
            )
        for index in map(int, np.flatnonzero(wanted & ~cursor.resetting)):
            seen, said = one_of((cursor.observations, cursor.info or {}), index)
            chosen.append(State(index, capture(envs.envs[index]), seen, said))

    trunk = single_path(
        envs,
        policy,
        steps=steps,
        after=after,
        info=info,
        seed=seed,
        device=device,
        before_step=keep,
    )
    if not chosen:
        raise TrustRegionError(
            "No state of the trunk was taken: the rule chose none, or those drawn were rows that "
            "only reset. Take more of them."
        )
    rounds = _rounds(chosen)
    ordered = [state for part in rounds for state in part]
    observations = tensors_of(stacked([state.observation for state in ordered]), device)
    said = tensors_of(stacked([state.info for state in ordered]), device)
    actions, allowed, sampling_log_prob = branch_actions(
        partial(policy, observations, **said),
        len(chosen),
        envs.single_action_space,
        branches,
        sampling,
        device,
    )
    branch = Branches(envs.envs, policy, critic, horizon, gamma, device)
    ending = capture(envs)
    q: list[Tensor] = []

    def batch() -> VineBatch:
        done = sum(map(len, q))
        return VineBatch(
            trunk=trunk,
            observations=mapped(lambda each: each[:done], observations),
            actions=mapped(lambda each: each[:done], actions),
            q=torch.cat(q) if q else torch.zeros(0, 0),
            sampling_log_prob=None if sampling_log_prob is None else sampling_log_prob[:done],
            steps=int(trunk.valid.sum()) + branch.steps,
            info=mapped(lambda each: each[:done], said),
        )

    try:
        ends = accumulate(map(len, rounds))
        for part, end in zip(rounds, ends, strict=True):
            rows = slice(end - len(part), end)
            tried = mapped(lambda each: each[rows], actions)  # noqa: B023 (used at once)
            q.append(branch.values(part, tried, allowed[rows], common=common_random_numbers))
    except Exception as error:
        raise RolloutError(
            f"A branch failed ({type(error).__name__}: {error}). The states that were finished are "
            "this error's batch.",
            batch(),
        ) from error
    finally:
        restore(envs, ending)
    return batch()


def _rounds(chosen: list[State]) -> list[list[State]]:
    """Return states in groups that hold one of an environment at most, to run side by side."""
    rounds: list[list[State]] = []
    seen = Counter[int]()
    for state in chosen:
        if seen[state.number] == len(rounds):
            rounds.append([])
        rounds[seen[state.number]].append(state)
        seen[state.number] += 1
    return rounds


def _uniform(states: int, steps: int, count: int) -> Rule:
    """Return the rule that takes so many of a trunk's rows, all alike."""
    rows = torch.randperm(steps * count)[:states]
    wanted = np.zeros((steps, count), dtype=bool)
    wanted.reshape(-1)[rows.numpy()] = True
    return lambda step, cursor: wanted[step]  # noqa: ARG005 (one form for all rules)


def _require(
    envs: SyncVectorEnv,
    *,
    states: int | Rule,
    branches: int | None,
    sampling: str,
    **whole: int,
) -> None:
    """Check the arguments that are not single_path's."""
    if not isinstance(envs, SyncVectorEnv):
        raise TrustRegionError(
            f"vine() got a {type(envs).__name__}. Branches need the environments themselves: use "
            "gymnasium.vector.SyncVectorEnv, with wrappers around each environment."
        )
    if not callable(states):
        whole["states"] = states
    if branches == 1:
        raise TrustRegionError(
            "branches is 1; it must be at least 2, or None for all actions: one action has nothing "
            "to be better than, and the gradient is zero."
        )
    if branches is not None:
        whole["branches"] = branches
    require_counts(**whole)
    rows = whole["steps"] * envs.num_envs
    if not callable(states) and states > rows:
        raise TrustRegionError(
            f"states is {states}, and the trunk has {rows} rows to take them of."
        )
    if sampling not in {"policy", "uniform"}:
        raise TrustRegionError(f"sampling is {sampling!r}; it must be 'policy' or 'uniform'.")
    if sampling == "uniform" and branches is None:
        raise TrustRegionError(
            "sampling='uniform' draws some of the actions: give their number as branches. Without, "
            "all are tried."
        )
    space = envs.single_action_space
    if not isinstance(space, gym.spaces.Discrete) and (branches is None or sampling == "uniform"):
        raise TrustRegionError(
            f"The actions are {space}, of which not all can be tried, nor drawn alike. Give the "
            "number of branches, and sampling='policy'."
        )
