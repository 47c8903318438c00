"""What the critic of the training example is taught: its unit, its targets, and its fit."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import numpy as np
import torch
from processes import Processes, moments
from torch import Tensor, nn

from trpo_optim import TrustRegionOptimizer
from trpo_optim.rollouts import SinglePathBatch, ValueFit, explained_variance, fit_value, gae

if TYPE_CHECKING:
    from train import Args
    from training_run import Run


def new_optimizer(args: Args, critic: nn.Module, processes: Processes) -> torch.optim.Optimizer:
    """Return what fits the critic."""
    if args.critic == "adam":
        return torch.optim.Adam(critic.parameters(), lr=args.critic_lr, fused=True)
    return TrustRegionOptimizer(
        critic.parameters(), max_kl=args.critic_kl, process_group=processes.group
    )


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


@torch.no_grad()
def fresh_targets(run: Run, batch: SinglePathBatch) -> Tensor:
    """Return a batch's V-trace targets by the present policy and critic, (T, N)."""
    log_ratios = batch.log_ratios(run.act)
    estimates, targets = advantages(run, batch, batch.rewards / scale(run), log_ratios)
    return targets + (log_ratios.exp().clamp(max=1.0) - 1) * estimates


def fit_critic(run: Run, batch: SinglePathBatch, targets: Tensor) -> ValueFit:
    """Fit the critic to the targets of the last batches."""
    args = run.args
    if args.critic_fresh:
        batches = run.earlier[: args.critic_batches]
        fitted = [
            (each.flat(each.observations), each.flat(fresh_targets(run, each))) for each in batches
        ]
    else:
        run.fitted.append((batch.flat(batch.observations), batch.flat(targets) * scale(run)))
        del run.fitted[: -args.critic_batches]
        fitted = [(seen, returns / scale(run)) for seen, returns in run.fitted]
    observations, aims = (torch.cat(each) for each in zip(*fitted, strict=True))
    if args.critic == "trpo":
        return _fit_by_steps(run, run.normalise(observations), aims)
    return fit_value(
        run.critic_of_all,
        run.normalise(observations),
        aims,
        run.critic_optimizer,
        epochs=args.critic_epochs,
        minibatch=max(1, args.critic_minibatch // run.processes.size),
    )


def _fit_by_steps(run: Run, observations: Tensor, targets: Tensor) -> ValueFit:
    """Fit the critic as the mean of a normal distribution over returns, by trust-region steps.

    The KL of a step is (V − V_old)²/2σ², where σ² is the mean squared error before the step.

    Returns:
        How well it fits.

    Source:
        Schulman et al., "High-Dimensional Continuous Control Using Generalized Advantage
        Estimation" (2016), section 5.
    """

    def values() -> Tensor:
        result: Tensor = run.critic(observations)
        return result[:, 0]

    with torch.no_grad():
        first = values()
    for _ in range(run.args.critic_epochs):
        with torch.no_grad():
            old = values()
        variance = float(np.mean(run.processes.all(float((old - targets).square().mean()))))

        def closure(old: Tensor = old, variance: float = variance) -> tuple[Tensor, Tensor]:
            present = values()
            loss = (present - targets).square().mean() / (2 * variance)
            return loss, (present - old).square().mean() / (2 * variance)

        run.critic_optimizer.step(closure)  # type: ignore[arg-type]  # one value, says torch
    with torch.no_grad():
        last = values()
    return ValueFit(
        loss=float((last - targets).square().mean()),
        explained_variance_before=explained_variance(first, targets),
        explained_variance=explained_variance(last, targets),
    )
