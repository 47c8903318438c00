"""Batches of real policies, with which to study how good one trust-region step is.

Training as in examples/advanced/train.py, with its defaults, is stopped early; what the policy of
that moment then sees and does goes into a pool, large enough to take a step on some of its rollouts
and to judge that step on all the others.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path

import agent
import critic_fit
import torch
import train
import workers
from checkpoint import whole
from scene import Scene
from torch import Tensor
from training_run import Run

FOLDER = Path("runs/pools")
"""Where pools are kept. Remove it if training has changed."""

ENVIRONMENTS = ("Hopper-v5", "HalfCheetah-v5", "CartPole-v1")
UPDATES = (0, 20, 100)
ROLLOUTS = 32


@dataclass(frozen=True)
class Pool:
    """What one policy saw and did: R consecutive rollouts of T environment steps each.

    The rows of a rollout go by time, and at each time over the environments side by side.
    """

    env_id: str
    updates: int  # of the policy, before the pool was collected
    policy: agent.Policy  # the one that acted
    observations: Tensor  # (R, T, D), normalised by the statistics of training
    actions: Tensor  # (R, T) or (R, T, A)
    advantages: Tensor  # (R, T), as GAE gives them

    @property
    def name(self) -> str:
        """The policy in words."""
        return f"{self.env_id}, {self.updates} updates"

    def scene(self, rollouts: Sequence[int], device: str = "cpu") -> Scene:
        """Return a copy of the policy with some rollouts, their advantages standardised.

        Neighbours share episodes. Where all episodes are of one length (HalfCheetah, a solved
        CartPole), a rollout sees one phase of them and evenly spaced ones the same: draw at random.
        """
        observations, actions, advantages = (
            each[list(rollouts)].flatten(0, 1).to(device)
            for each in (self.observations, self.actions, self.advantages)
        )
        advantages = (advantages - advantages.mean()) / (advantages.std() + 1e-8)
        return Scene(copy.deepcopy(self.policy).to(device), observations, actions, advantages)


def trained(args: train.Args, updates: int) -> Run:
    """Return a run after so many updates."""
    run = train.new_run(args)
    for _ in range(updates):
        train.improve(run, train.collect(run))
        run.update += 1
    return run


def make(env_id: str, updates: int, rollouts: int) -> Pool:
    """Return the pool of a policy that is trained for it, the same bits if torch has one thread.

    Rollouts do not depend on how many follow. The first is the very batch that training would have
    gone on with. Training counts a batch's returns before it scales the batch's rewards; so the
    first rollout's count here, too, and set one scale for the whole pool. Everything else is frozen
    before it.
    """
    run = trained(train.Args(env_id=env_id), updates)
    rows: list[tuple[Tensor, ...]] = []
    for number in range(rollouts):
        batch = train.collect(run)
        if number == 0:
            critic_fit.count_returns(run, batch)
        estimates = critic_fit.advantages(run, batch, run.args.gae_lambda)
        seen = run.normalise(batch.flat(batch.observations))
        rows.append((seen, batch.flat(batch.actions), batch.flat(estimates)))
    run.envs.close()
    return Pool(env_id, updates, run.policy, *map(torch.stack, zip(*rows, strict=True)))


def pool(env_id: str, updates: int, rollouts: int = ROLLOUTS) -> Pool:
    """Return a pool. One that is missing is made, which can take minutes."""
    path = FOLDER / f"{env_id}__{updates}__{rollouts}.pool"
    if not path.exists():
        with workers.pool(1) as process:
            made = process.submit(make, env_id, updates, rollouts).result()
        with whole(path) as file:
            torch.save(made, file)
    found: Pool = torch.load(path, weights_only=False)
    return found


def pools(rollouts: int = ROLLOUTS) -> list[Pool]:
    """Return the pools of all environments and numbers of updates, in this order."""
    return [pool(*each, rollouts) for each in product(ENVIRONMENTS, UPDATES)]
