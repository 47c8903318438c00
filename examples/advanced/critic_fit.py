"""What the critic of the training example is taught: its unit, its targets, and its fit."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch
from processes import moments
from torch import Tensor

from trpo_optim.rollouts import SinglePathBatch, ValueFit, fit_value, gae

if TYPE_CHECKING:
    from training_run import Run


def scale(run: Run) -> float:
    """Return the standard deviation of the discounted returns so far, the unit of the critic."""
    return math.sqrt(run.return_stats.var + 1e-8)


def scaled_rewards(run: Run, batch: SinglePathBatch) -> Tensor:
    """Return rewards over the scale, (T, N), the batch counted in."""
    returns = []
    for reward, ends in zip(batch.rewards, batch.terminated | batch.truncated, strict=True):
        run.discounted = run.args.gamma * run.discounted + reward
        returns.append(run.discounted)
        run.discounted = run.discounted * ~ends
    for each in run.processes.all(moments(torch.cat(returns).double())):
        run.return_stats.update_from_moments(*each)
    return batch.rewards / scale(run)


def advantages(
    run: Run, batch: SinglePathBatch, rewards: Tensor, log_ratios: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Return GAE's advantages and the critic's targets, both (T, N)."""
    fade = {"gamma": run.args.gamma, "gae_lambda": run.args.gae_lambda}
    values, following = batch.values(run.value)
    result = gae(rewards, values, following, batch.ends, log_ratios=log_ratios, **fade)
    return result, result + values


def fit_critic(run: Run, batch: SinglePathBatch, targets: Tensor) -> ValueFit:
    """Fit the critic to the targets of the last batches."""
    args = run.args
    run.fitted.append((batch.flat(batch.observations), batch.flat(targets) * scale(run)))
    del run.fitted[: -args.critic_batches]
    observations, aims = (torch.cat(each) for each in zip(*run.fitted, strict=True))
    return fit_value(
        run.critic_of_all,
        run.normalise(observations),
        aims / scale(run),
        run.critic_optimizer,
        epochs=args.critic_epochs,
        minibatch=max(1, args.critic_minibatch // run.processes.size),
    )
