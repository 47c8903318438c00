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


def count_returns(run: Run, batch: SinglePathBatch) -> None:
    """Count the discounted returns of a new batch in, so that they set the scale."""
    returns = []
    for reward, ends in zip(batch.rewards, batch.terminated | batch.truncated, strict=True):
        run.discounted = run.args.gamma * run.discounted + reward
        returns.append(run.discounted)
        run.discounted = run.discounted * ~ends
    for each in run.processes.all(moments(torch.cat(returns).double())):
        run.return_stats.update_from_moments(*each)


def advantages(
    run: Run, batch: SinglePathBatch, gae_lambda: float, log_ratios: Tensor | None = None
) -> Tensor:
    """Return GAE's advantages by the present critic, (T, N), in its unit."""
    return gae(
        batch.rewards / scale(run),
        *batch.values(run.value),
        batch.ends,
        gamma=run.args.gamma,
        gae_lambda=gae_lambda,
        log_ratios=log_ratios,
    )


def errors(run: Run, batch: SinglePathBatch) -> Tensor:
    """Return the critic's targets, which are λ-returns, less its present values: (T, N)."""
    args = run.args
    fade = args.gae_lambda if args.critic_lambda is None else args.critic_lambda
    return advantages(run, batch, fade)


def targets(run: Run, batch: SinglePathBatch) -> Tensor:
    """Return what the critic is taught of a batch: λ-returns by its present values, (T, N)."""
    values, _ = batch.values(run.value)
    return values + errors(run, batch)


def fit_critic(run: Run) -> ValueFit:
    """Fit the critic to the last batches."""
    args, taught = run.args, run.batches[: run.args.critic_batches]
    return fit_value(
        run.critic_of_all,
        run.normalise(torch.cat([batch.flat(batch.observations) for batch in taught])),
        torch.cat([batch.flat(targets(run, batch)) for batch in taught]),
        run.critic_optimizer,
        epochs=args.critic_epochs,
        minibatch=max(1, args.critic_minibatch // run.processes.size),
    )
