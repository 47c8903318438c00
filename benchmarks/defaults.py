"""The defaults of ``policy_closure`` beside those of sb3-contrib, on real batches."""

from __future__ import annotations

import copy
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from peers import PeerBatch, Sb3Contrib, Tianshou
from real_batches import Pool, RealBatch, pools
from step_case import RADIUS, Case
from table import steps_of, table
from timing import Job, taken_in_turn
from torch import Tensor, nn

from trpo_optim import TrustRegionOptimizer
from trpo_optim.rollouts import SinglePathBatch, policy_closure
from trpo_optim.rollouts.trajectories import Cursor

ROLLOUTS = {2: 2048, 8: 8192, 20: 20_480}
"""Samples of a batch, by its number of rollouts."""

TIMED = ("HalfCheetah-v5", 100)
"""The policy whose steps are timed: its task, and its updates so far."""


def trajectories(batch: RealBatch) -> SinglePathBatch:
    """Return a real batch as one that ``single_path`` returned; rewards are not used."""
    count = len(batch.advantages)
    zeros = torch.zeros(count, 1)
    never = torch.zeros(count, 1, dtype=torch.bool)
    nothing: Any = torch.zeros(0, dtype=torch.long)
    return SinglePathBatch(
        observations=batch.observations[:, None],
        actions=batch.actions[:, None],
        rewards=zeros,
        terminated=never,
        truncated=never,
        starts=never,
        valid=~never,
        cut_observations=batch.observations[:0],
        cut_rows=nothing.reshape(0, 2),
        state=None,
        episode_returns=[],
        episode_lengths=[],
        end=Cursor(None, None, never.numpy(), never.numpy(), zeros.numpy(), zeros.numpy()),
    )


def ours(policy: nn.Module, batch: RealBatch) -> tuple[Job, TrustRegionOptimizer]:
    """Return a job that builds the closures of a batch and takes one step, all by default."""
    optimizer = TrustRegionOptimizer(policy.parameters(), max_kl=RADIUS)
    start = [each.detach().clone() for each in policy.parameters()]
    rows, advantages = trajectories(batch), batch.advantages[:, None]

    def reset() -> None:
        torch._foreach_copy_([each.detach() for each in policy.parameters()], start)

    return Job(lambda: optimizer.step(policy_closure(policy, rows, advantages)), reset), optimizer


def theirs(
    policy: nn.Module, batch: RealBatch, kind: type[Sb3Contrib | Tianshou] = Sb3Contrib
) -> Sb3Contrib | Tianshou:
    """Return another library with its defaults, but for the radius, on a batch."""
    with torch.no_grad():
        old = policy(batch.observations).log_prob(batch.actions)
    rows = PeerBatch(batch.observations, batch.actions, batch.advantages, old)
    return kind(policy, rows, max_kl=RADIUS, damping=None, cg_iterations=None)


def peer_step(case: Case, kind: type[Sb3Contrib | Tianshou]) -> Tensor:
    """Return the step that another library takes at its defaults.

    Args:
        case: What the step is taken on.
        kind: The library.
    """
    peer = theirs(case.policy, case.own, kind)
    peer.update()
    return case.vector.gather([each.detach() for each in peer.parameters()]) - case.origin


def our_step(case: Case) -> Tensor:
    """Return the step that the defaults take."""
    policy = copy.deepcopy(case.pool.policy)
    job, _ = ours(policy, case.own)
    job.run()
    return case.vector.gather([each.detach() for each in policy.parameters()]) - case.origin


def held_out(all_pools: Sequence[Pool], rollouts: int) -> tuple[float, float]:
    """Return the mean held-out gains of both steps at equal KL, ours and theirs."""
    gains: list[tuple[float, float]] = []
    for pool in all_pools:
        generator = torch.Generator().manual_seed(rollouts)
        case = Case(pool, torch.randperm(32, generator=generator).tolist()[:rollouts])
        gains.append(
            (
                case.gains(our_step(case)).held_out,
                case.gains(peer_step(case, Sb3Contrib)).held_out,
            )
        )
    mine, other = zip(*gains, strict=True)
    return statistics.mean(mine), statistics.mean(other)


def beside_sb3(folder: Path, rounds: int) -> str:
    """Return the table of times and held-out gains.

    Args:
        folder: Where the pools are kept; missing ones are made.
        rounds: Timed rounds.
    """
    all_pools = pools(folder)
    timed = next(
        each for each in all_pools if (each.env_id, each.updates) == ("HalfCheetah-v5", 100)
    )
    head = ["samples", "sb3-contrib (ms)", "times faster", "held-out gain, in sb3-contrib's"]
    rows = [[*head, "evaluations", "products"]]
    for rollouts, samples in ROLLOUTS.items():
        batch, _ = timed.split(range(rollouts))
        policy = copy.deepcopy(timed.policy)
        job, optimizer = ours(policy, batch)
        peer = theirs(timed.policy, batch)
        jobs = {"ours": job, "theirs": Job(peer.update, peer.reset)}
        times = taken_in_turn(jobs, rounds)
        mine, other = held_out(all_pools, rollouts)
        report = optimizer.last_report
        assert report is not None
        rows.append(
            [
                steps_of(samples),
                f"{1000 * times['theirs'].median:.1f}",
                times["theirs"].over(times["ours"]),
                f"{mine / other:.3f}",
                str(report.closure_evaluations),
                str(report.fisher_products),
            ]
        )
    return table(*rows)
