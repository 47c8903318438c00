"""Advantages and returns of trajectories, time first; every function is pure."""

from __future__ import annotations

import torch
from torch import Tensor

from trpo_optim.errors import TrustRegionError
from trpo_optim.rollouts.arguments import require_counts, require_shares

__all__ = [
    "discounted_returns",
    "explained_variance",
    "gae",
    "n_step_returns",
    "trajectory_weights",
]


def gae(
    rewards: Tensor,
    values: Tensor,
    next_values: Tensor,
    ends: Tensor,
    *,
    gamma: float,
    gae_lambda: float,
) -> Tensor:
    """Return generalised advantage estimates, Σ (γλ)ˡ δₜ₊ₗ up to the trajectory's end.

    Args:
        rewards: rₜ, shape (T, N).
        values: V(sₜ), shape (T, N).
        next_values: V(sₜ₊₁) of the state that followed, 0 where the episode terminated, (T, N).
        ends: True where the trajectory does not go on with the next row, (T, N).
        gamma: Discount factor γ, in [0, 1].
        gae_lambda: λ, in [0, 1]: 0 for the temporal difference, 1 for the return less the value.

    Returns:
        Shape (T, N). Added to the values they are the critic's targets.

    Raises:
        TrustRegionError: If shapes differ, there are no rows, or γ or λ are outside [0, 1].

    Source:
        Schulman, Moritz, Levine, Jordan & Abbeel, "High-Dimensional Continuous Control Using
        Generalized Advantage Estimation", ICLR 2016, equation 16.
    """
    _require_rows(rewards=rewards, values=values, next_values=next_values, ends=ends)
    require_shares(gamma=gamma, gae_lambda=gae_lambda)
    deltas = rewards + gamma * next_values - values
    return _discounted(deltas, torch.zeros_like(deltas), ends, gamma * gae_lambda)


def discounted_returns(
    rewards: Tensor, next_values: Tensor, ends: Tensor, *, gamma: float
) -> Tensor:
    """Return Σ γˡ rₜ₊ₗ, the Monte Carlo Q; where a trajectory is cut, the rest by the critic.

    Args:
        rewards: rₜ, shape (T, N).
        next_values: V(sₜ₊₁), used where a trajectory ends: 0 where it terminated, (T, N).
        ends: True where the trajectory does not go on with the next row, (T, N).
        gamma: Discount factor γ, in [0, 1].

    Returns:
        Shape (T, N).

    Raises:
        TrustRegionError: If shapes differ, there are no rows, or γ is outside [0, 1].
    """
    _require_rows(rewards=rewards, next_values=next_values, ends=ends)
    require_shares(gamma=gamma)
    return _discounted(rewards, next_values, ends, gamma)


def n_step_returns(
    rewards: Tensor, next_values: Tensor, ends: Tensor, *, gamma: float, steps: int
) -> Tensor:
    """Return the n-step Q: n rewards, or those to the end, and the value of what follows.

    Args:
        rewards: rₜ, shape (T, N).
        next_values: V(sₜ₊₁), 0 where the episode terminated, (T, N).
        ends: True where the trajectory does not go on with the next row, (T, N).
        gamma: Discount factor γ, in [0, 1].
        steps: n, at least 1.

    Returns:
        Shape (T, N).

    Raises:
        TrustRegionError: If shapes differ, there are no rows, γ is outside [0, 1], or n below 1.
    """
    _require_rows(rewards=rewards, next_values=next_values, ends=ends)
    require_shares(gamma=gamma)
    require_counts(steps=steps)
    result = rewards + gamma * next_values
    stop = ends | (torch.arange(len(ends), device=ends.device) == len(ends) - 1)[:, None]
    for _ in range(min(steps, len(rewards)) - 1):
        longer = torch.cat([result[1:], result[-1:]])
        result = torch.where(stop, result, rewards + gamma * longer)
    return result


def trajectory_weights(
    log_ratios: Tensor, starts: Tensor, *, largest: float = float("inf")
) -> Tensor:
    """Return what makes an earlier policy's trajectories stand for the present one's.

    The product of π/π_behaviour over the actions before each step: the weight of its state. The
    ratio of the step's own action belongs to the surrogate.

    Args:
        log_ratios: ln π(aₜ|sₜ) − ln π_behaviour(aₜ|sₜ), shape (T, N).
        starts: True where an episode begins, (T, N).
        largest: Where weights are cut off, against their variance; at the price of a bias.

    Returns:
        Shape (T, N); 1 at the start of an episode, and of the batch.

    Raises:
        TrustRegionError: If shapes differ, there are no rows, or the largest weight is not
            positive.

    Source:
        Precup, Sutton & Singh, "Eligibility Traces for Off-Policy Policy Evaluation", ICML 2000.
    """
    _require_rows(log_ratios=log_ratios, starts=starts)
    if not largest > 0:
        raise TrustRegionError(f"largest is {largest!r}; it must be above 0.")
    weights = torch.zeros_like(log_ratios)
    before = torch.zeros_like(log_ratios[0])
    for step, ratio in enumerate(log_ratios):
        before = torch.where(starts[step], 0.0, before)
        weights[step] = before
        before = before + ratio
    return weights.exp().clamp(max=largest)


def explained_variance(predictions: Tensor, targets: Tensor) -> float:
    """Return 1 − var(targets − predictions)/var(targets): 1 is perfect, 0 as good as their mean.

    Args:
        predictions: Any shape.
        targets: The same.

    Returns:
        A number; NaN where the targets are all the same.

    Raises:
        TrustRegionError: If shapes differ or there are no rows.
    """
    _require_one_shape(predictions=predictions, targets=targets)
    spread = targets.double().var(correction=0)
    left = (targets.double() - predictions.double()).var(correction=0)
    return float(1 - left / spread) if spread > 0 else float("nan")


def _discounted(terms: Tensor, rest: Tensor, ends: Tensor, fade: float) -> Tensor:
    """Return Σ fadeˡ termsₜ₊ₗ along each trajectory, with fade · rest after its end."""
    result = torch.zeros_like(terms)
    following = rest[-1]
    for step in reversed(range(len(terms))):
        following = terms[step] + fade * torch.where(ends[step], rest[step], following)
        result[step] = following
    return result


def _require_rows(**values: Tensor) -> None:
    """Check that tensors are of one shape (T, N), with rows in it, and of the right kind."""
    _require_one_shape(**values)
    for name, value in values.items():
        if value.dim() != 2:
            raise TrustRegionError(f"{name} has shape {tuple(value.shape)}; it must be (T, N).")
        if name in {"ends", "starts"}:
            if value.dtype != torch.bool:
                raise TrustRegionError(f"{name} is {value.dtype}; it must be torch.bool.")
        elif not value.is_floating_point():
            raise TrustRegionError(f"{name} is {value.dtype}; it must be floating point.")


def _require_one_shape(**values: Tensor) -> None:
    shapes = {name: tuple(value.shape) for name, value in values.items()}
    if len(set(shapes.values())) > 1:
        raise TrustRegionError(f"The shapes differ: {shapes}. All must be the same.")
    name, value = next(iter(values.items()))
    if value.numel() == 0:
        raise TrustRegionError(f"{name} is empty (shape {tuple(value.shape)}): there are no rows.")
