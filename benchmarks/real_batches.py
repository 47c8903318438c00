"""Batches of real policies, with which to study how good one trust-region step is.

    PYTHONPATH=examples/advanced python benchmarks/real_batches.py

Training as in examples/advanced/train.py, with its defaults, is stopped early; what the policy of
that moment then sees and does goes into a pool, large enough to take a step on some of its rollouts
and to judge that step on all the others.
"""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path

import agent
import gymnasium as gym
import torch
import train
import tyro
from table import table
from torch import Tensor

ENVIRONMENTS = ("Hopper-v5", "HalfCheetah-v5", "CartPole-v1")
UPDATES = (0, 20, 100)
ROLLOUTS = 32


@dataclass(frozen=True)
class RealBatch:
    """Rows that one policy collected."""

    observations: Tensor  # (N, D), normalised as in training
    actions: Tensor  # (N,) or (N, A)
    advantages: Tensor  # (N,), of mean 0 and standard deviation 1

    def __getitem__(self, rows: Tensor) -> RealBatch:
        """Return some of the rows."""
        return RealBatch(self.observations[rows], self.actions[rows], self.advantages[rows])


@dataclass(frozen=True)
class Pool:
    """What one policy saw and did: R consecutive rollouts of T environment steps each.

    The rows of a rollout go by time, and at each time over the environments side by side.
    """

    env_id: str
    updates: int  # of the policy, before the pool was collected
    policy: agent.Policy  # the one that acted: deepcopy it before you take a step
    observations: Tensor  # (R, T, D), normalised by the statistics of training
    actions: Tensor  # (R, T) or (R, T, A)
    advantages: Tensor  # (R, T), as GAE gives them
    returns: Tensor  # (E,), of the episodes that ended in the pool

    def split(self, own: Sequence[int]) -> tuple[RealBatch, RealBatch]:
        """Divide the pool into a batch to take a step on and one to judge the step on.

        Args:
            own: The numbers of the rollouts of the first batch, each once. Neighbours share
                episodes. Where all episodes are of one length (HalfCheetah, a solved CartPole), a
                rollout sees one phase of them and evenly spaced ones the same: draw at random.

        Returns:
            The named rollouts as one batch and all others as another, the advantages of each
            normalised over its own rows.

        Raises:
            ValueError: If a number names no rollout or comes twice, or a batch would be empty.
        """
        count, named = len(self.advantages), set(own)
        if not named < set(range(count)) or not 0 < len(own) == len(named):
            raise ValueError(
                f"own must name some, but not all, of the rollouts 0 to {count - 1}, each once; "
                f"got {list(own)}."
            )
        return self._batch(own), self._batch([each for each in range(count) if each not in named])

    def _batch(self, rollouts: Sequence[int]) -> RealBatch:
        rows = torch.tensor(rollouts)
        advantages = self.advantages[rows].flatten()
        return RealBatch(
            observations=self.observations[rows].flatten(0, 1),
            actions=self.actions[rows].flatten(0, 1),
            advantages=(advantages - advantages.mean()) / (advantages.std() + 1e-8),
        )


def make(env_id: str, updates: int, rollouts: int = ROLLOUTS) -> Pool:
    """Train a policy and collect its pool, the same bits each time (torch on one thread).

    The first rollout is the very batch that training would have gone on with. Training counts a
    batch's returns before it scales the batch's rewards; so the first rollout's count here, too,
    and set one scale for the whole pool. Everything else is frozen before it.

    Args:
        env_id: The Gymnasium environment.
        updates: After how many updates to stop.
        rollouts: How many to collect. The first ones do not depend on their number.

    Returns:
        The pool.
    """
    run = train.new_run(train.Args(env_id=env_id))
    for _ in range(updates):
        train.improve(run, train.collect(run))
        run.update += 1
    before = len(run.episodes)
    observations, actions, advantages = [], [], []
    for number in range(rollouts):
        batch = train.collect(run)
        if number == 0:
            train.scaled_rewards(run, batch)
        rewards = batch.rewards / math.sqrt(run.return_stats.var + 1e-8)
        observations.append(run.normalise(batch.flat(batch.observations)))
        actions.append(batch.flat(batch.actions))
        advantages.append(batch.flat(train.advantages(run, batch, rewards)[0]))
    run.envs.close()
    return Pool(
        env_id=env_id,
        updates=updates,
        policy=run.policy,
        observations=torch.stack(observations),
        actions=torch.stack(actions),
        advantages=torch.stack(advantages),
        returns=torch.tensor([value for _, value in run.episodes[before:]]),
    )


def save(pool: Pool, path: Path) -> None:
    """Write a pool so that whatever happens, there is a whole file or none."""
    names = ("observations", "actions", "advantages", "returns")
    content = {name: getattr(pool, name) for name in names} | {"policy": pool.policy.state_dict()}
    half = path.with_suffix(f".{os.getpid()}.tmp")
    with half.open("wb") as file:  # torch.save writes a path's name into the file
        torch.save(content, file)
    half.replace(path)


def load(path: Path, env_id: str, updates: int) -> Pool:
    """Return a saved pool."""
    content = torch.load(path, weights_only=True)
    weights = content.pop("policy")
    outputs = len(weights["network.4.bias"])
    box = gym.spaces.Box(-math.inf, math.inf, (outputs,))
    space = box if "log_std" in weights else gym.spaces.Discrete(outputs)
    policy = agent.Policy(content["observations"].shape[-1], space, train.Args())
    policy.load_state_dict(weights)
    return Pool(env_id=env_id, updates=updates, policy=policy, **content)


def pool(folder: Path, env_id: str, updates: int, rollouts: int = ROLLOUTS) -> Pool:
    """Return a pool.

    Torch's random state and number of threads are afterwards what they were.

    Args:
        folder: Where pools are kept. One that is missing is made, which can take minutes; one that
            is there is taken as it is, even if training has changed since.
        env_id: The Gymnasium environment.
        updates: Of the policy.
        rollouts: Of the pool.
    """
    path, threads = folder / f"{env_id}__{updates}__{rollouts}.pt", torch.get_num_threads()
    folder.mkdir(parents=True, exist_ok=True)
    with torch.random.fork_rng(devices=[]):
        torch.set_num_threads(train.Args.threads)
        try:
            if not path.exists():
                save(make(env_id, updates, rollouts), path)
            return load(path, env_id, updates)
        finally:
            torch.set_num_threads(threads)


def pools(folder: Path, rollouts: int = ROLLOUTS) -> list[Pool]:
    """Return the pools of all environments and numbers of updates, in this order.

    Args:
        folder: Where they are kept; see ``pool``.
        rollouts: Of each pool.
    """
    return [pool(folder, *each, rollouts) for each in product(ENVIRONMENTS, UPDATES)]


def main(folder: Path = Path("runs/pools"), rollouts: int = ROLLOUTS) -> None:
    """Make the pools that are missing and print a table of all.

    Args:
        folder: Where the pools are kept.
        rollouts: Of each pool.
    """
    rows = [["environment", "updates", "samples", "episodes", "mean return"]]
    rows[0] += ["std of advantages", "entropy", "mean log std"]
    for each in pools(folder, rollouts):
        entropy = each.policy(each.observations.flatten(0, 1)).entropy().mean()
        log_std = "" if each.policy.discrete else f"{each.policy.log_std.mean():.3f}"
        counts = [str(each.updates), str(each.advantages.numel()), str(len(each.returns))]
        means = [f"{each.returns.mean():.1f}", f"{each.advantages.std():.3f}", f"{entropy:.3f}"]
        rows.append([each.env_id, *counts, *means, log_std])
    print(table(*rows))


if __name__ == "__main__":
    tyro.cli(main)
