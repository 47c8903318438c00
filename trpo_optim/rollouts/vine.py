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

from trpo_optim.distributions.arguments import require_counts
from trpo_optim.distributions.nesting import mapped
from trpo_optim.errors import RolloutError, TrustRegionError
from trpo_optim.rollouts.arguments import require_shares
from trpo_optim.rollouts.branch_actions import branch_actions
from trpo_optim.rollouts.branches import Branches, State
from trpo_optim.rollouts.single_path import single_path
from trpo_optim.rollouts.spaces import evaluated, one_of, stacked, tensors_of
from trpo_optim.rollouts.trajectories import Cursor, SinglePathBatch
from trpo_optim.snapshots.snapshot import capture, restore

__all__ = ["VineBatch", "vine"]

Rule = Callable[[int, Cursor], "np.ndarray[Any, Any]"]
"""From a step's number and the trunk's ``Cursor`` to the environments to branch from, bools
(N,)."""


@dataclass(frozen=True, eq=False, repr=False)
class VineBatch:
    """S states of the trunk, K actions tried from each.

    Attributes:
        trunk: The trajectories that the states were taken from.
        observations: The observations of the states, (S, …).
        actions: Shape (S, K, …).
        q: Estimates of Q(s, a), shape (S, K). If all actions are tried, those that the policy rules
            out are not run and have NaN.
        sampling_log_prob: ln q(a|s) of the actions, (S, K). None if all actions were tried.
        steps: Simulator steps of trunk and branches together.
        info: The entries that ``vine(info=…)`` requested, (S, …) by name.

    Example:
        >>> import gymnasium as gym, torch
        >>> from torch.distributions import Categorical
        >>> from trpo_optim.rollouts import vine
        >>> envs = gym.vector.SyncVectorEnv([lambda: gym.make("CartPole-v1")] * 2)
        >>> policy = lambda seen: Categorical(logits=torch.zeros(len(seen), 2))
        >>> batch = vine(envs, policy, steps=4, states=3, horizon=2, gamma=0.5)
        >>> batch.q  # two steps with the reward 1, for three states and two actions
        tensor([[1.5000, 1.5000],
                [1.5000, 1.5000],
                [1.5000, 1.5000]])
    """

    trunk: SinglePathBatch
    observations: Any
    actions: Any
    q: Tensor
    sampling_log_prob: Tensor | None
    steps: int
    info: dict[str, Any] = field(default_factory=dict)

    def __repr__(self) -> str:
        """Return the sizes, and not the numbers, in one line."""
        states, actions = self.q.shape
        return f"VineBatch({states} states, {actions} actions of each, {self.steps} steps)"


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
    """Collect trajectories (the trunk), return to some states, and try several actions from each.

    The environments end where the trunk ended, so the next call can go on ``after`` it.

    Args:
        envs: Environments whose states can be captured (``capture``), without vector wrappers.
        policy: A function from observations (N, …) to a distribution, or a dict or tuple of
            distributions.
        steps: The number of steps of each environment on the trunk.
        states: The number of trunk rows to branch from, drawn uniformly. Rows that only reset
            (``AutoresetMode.NEXT_STEP``) are left out. Or a rule: a function that is called before
            each step with its number and the ``Cursor``, and returns a boolean array (N,).
        branches: K, the number of actions to try from each state, at least 2 (eq. 16). None: every
            action of a Discrete space that the policy does not rule out (eq. 15).
        sampling: How K actions are drawn: by the ``"policy"``, or ``"uniform"`` over the actions
            that the policy does not rule out.
        horizon: The most steps of a branch, including its first action.
        gamma: Discount factor γ, in [0, 1].
        critic: The value of a branch's last observation, from observations (B, …) to (B,) or
            (B, 1). None: 0.
        common_random_numbers: Whether the branches of a state get the same random numbers, in the
            policy's sampling and in the environment's ``np_random``. This lowers the variance of
            their differences. Generators of wrappers and emulators go on as they were captured.
        after: The vine or the rollout that this trunk goes on from, or its ``end``. None: the
            environments are reset.
        info: Names of entries in the environments' info that the policy gets as keyword arguments,
            as in ``single_path``.
        seed: The seed of the reset. The i-th environment gets ``seed + i``.
        device: The device of policy and critic.

    Returns:
        The batch.

    Raises:
        TrustRegionError: If an argument does not fit, or the environments cannot be captured.
        RolloutError: If an environment fails. On a branch, the error's batch holds the states that
            were finished. On the trunk, it holds what ``single_path`` collected.

    Example:
        >>> import gymnasium as gym, torch
        >>> from torch.distributions import Categorical
        >>> from trpo_optim.rollouts import vine
        >>> envs = gym.vector.SyncVectorEnv([lambda: gym.make("CartPole-v1")] * 2)
        >>> network = torch.nn.Linear(4, 2)
        >>> policy = lambda observations: Categorical(logits=network(observations))
        >>> batch = vine(envs, policy, steps=8, states=4, horizon=3, gamma=0.99)
        >>> batch.q.shape
        torch.Size([4, 2])

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
            "No state of the trunk was taken: the rule chose none, or all drawn rows only reset. "
            "Take more states."
        )
    rounds = _rounds(chosen)
    ordered = [state for part in rounds for state in part]
    observations = tensors_of(stacked([state.observation for state in ordered]), device)
    said = tensors_of(stacked([state.info for state in ordered]), device)
    actions, allowed, sampling_log_prob = branch_actions(
        partial(evaluated, policy, observations, info=said),
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
    rows = torch.randperm(steps * count, device="cpu")[:states]
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
            "branches is 1; it must be at least 2, or None for all actions. With one action per "
            "state the gradient is zero."
        )
    if branches is not None:
        whole["branches"] = branches
    require_counts(**whole)
    rows = whole["steps"] * envs.num_envs
    if not callable(states) and states > rows:
        raise TrustRegionError(
            f"states is {states}, and the trunk has {rows} rows. Take fewer states or more steps."
        )
    if sampling not in {"policy", "uniform"}:
        raise TrustRegionError(f"sampling is {sampling!r}; it must be 'policy' or 'uniform'.")
    if sampling == "uniform" and branches is None:
        raise TrustRegionError(
            "sampling is 'uniform' and branches is None, which tries all actions. Pass branches=K "
            "to draw K actions."
        )
    space = envs.single_action_space
    if not isinstance(space, gym.spaces.Discrete) and (branches is None or sampling == "uniform"):
        raise TrustRegionError(
            f"{space} is not discrete, so vine cannot enumerate its actions. Pass branches=K and "
            "sampling='policy'."
        )
