"""Advantages and returns of trajectories, time first. Every function is pure."""

from __future__ import annotations

import torch
from torch import Tensor

from trpo_optim.distributions.arguments import require_counts, require_tensor
from trpo_optim.distributions.precision import widened
from trpo_optim.errors import TrustRegionError
from trpo_optim.rollouts.arguments import require_shares

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
    log_ratios: Tensor | None = None,
    largest: float = 1.0,
) -> Tensor:
    """Return generalised advantage estimates, Σ (γλ)ˡ δₜ₊ₗ up to the end of the trajectory.

    With ``log_ratios``, these are advantages of the present policy π from trajectories of an
    earlier policy: Aₜ = δₜ + γλ min(``largest``, ρₜ₊₁) Aₜ₊₁ with ρ = π/π_behaviour. The ratio ρₜ of
    the row's own action belongs to the surrogate.

    Args:
        rewards: rₜ, shape (T, N).
        values: V(sₜ), shape (T, N).
        next_values: V(sₜ₊₁), and 0 where the episode terminated, (T, N).
        ends: True where the trajectory does not go on with the next row, (T, N).
        gamma: Discount factor γ, in [0, 1].
        gae_lambda: λ, in [0, 1]. 0 gives the temporal difference, 1 the return minus the value.
        log_ratios: ln ρₜ, (T, N), as ``SinglePathBatch.log_ratios`` returns them. None: the present
            policy drew the actions.
        largest: The limit of each ratio. With infinity and λ = 1 the estimate is unbiased for
            every V. A lower limit means less variance and more bias.

    Returns:
        Shape (T, N). Without ``log_ratios``, the advantages plus the values are the critic's
        targets. With them, the values plus min(``largest``, ρₜ) times the advantages are.

    Raises:
        TrustRegionError: If shapes differ, there are no rows, γ or λ are outside [0, 1], or
            ``largest`` is not positive.

    Example:
        >>> import torch
        >>> from trpo_optim.rollouts import gae
        >>> rewards, values = torch.ones(3, 1), torch.zeros(3, 1)  # three steps, terminated
        >>> ends = torch.tensor([[False], [False], [True]])
        >>> gae(rewards, values, values, ends, gamma=0.5, gae_lambda=1.0).T
        tensor([[1.7500, 1.5000, 1.0000]])

    Source:
        Schulman, Moritz, Levine, Jordan & Abbeel, "High-Dimensional Continuous Control Using
        Generalized Advantage Estimation", ICLR 2016, equation 16. The ratios: with λ = 1, the
        estimate is r + γv′ − V. There, v′ is the V-trace target of the next state, with both of
        its limits equal to ``largest`` (Espeholt et al., "IMPALA", ICML 2018, equation 1). Retrace
        has the same traces, λ min(1, ρ), but the temporal differences of Q in place of V. If its Q
        is right, a cut adds no bias (Munos et al., "Safe and Efficient Off-Policy Reinforcement
        Learning", NIPS 2016).
    """
    _require_rows(rewards=rewards, values=values, next_values=next_values, ends=ends)
    require_shares(gamma=gamma, gae_lambda=gae_lambda)
    deltas = rewards + gamma * next_values - values
    traces = None
    if log_ratios is not None:
        _require_rows(rewards=rewards, log_ratios=log_ratios)
        _require_positive(largest=largest)
        wide = widened(log_ratios, torch.float64)  # products may be large or small on the way
        traces = wide.exp().clamp(max=largest)
    found = _discounted(deltas, torch.zeros_like(deltas), ends, gamma * gae_lambda, traces)
    return found.to(deltas.dtype)


def discounted_returns(
    rewards: Tensor, next_values: Tensor, ends: Tensor, *, gamma: float
) -> Tensor:
    """Return Σ γˡ rₜ₊ₗ, the Monte Carlo estimate of Q, bootstrapped where a trajectory is cut.

    Args:
        rewards: rₜ, shape (T, N).
        next_values: V(sₜ₊₁), and 0 where the episode terminated, (T, N). Only the values at the end
            of a trajectory are used.
        ends: True where the trajectory does not go on with the next row, (T, N).
        gamma: Discount factor γ, in [0, 1].

    Returns:
        Shape (T, N).

    Raises:
        TrustRegionError: If shapes differ, there are no rows, or γ is outside [0, 1].

    Example:
        >>> import torch
        >>> from trpo_optim.rollouts import discounted_returns
        >>> ends = torch.tensor([[False], [False], [True]])
        >>> terminated, truncated = torch.zeros(3, 1), torch.full((3, 1), 8.0)
        >>> discounted_returns(torch.ones(3, 1), terminated, ends, gamma=0.5).T
        tensor([[1.7500, 1.5000, 1.0000]])
        >>> discounted_returns(torch.ones(3, 1), truncated, ends, gamma=0.5).T
        tensor([[2.7500, 3.5000, 5.0000]])
    """
    _require_rows(rewards=rewards, next_values=next_values, ends=ends)
    require_shares(gamma=gamma)
    return _discounted(rewards, next_values, ends, gamma)


def n_step_returns(
    rewards: Tensor, next_values: Tensor, ends: Tensor, *, gamma: float, steps: int
) -> Tensor:
    """Return the n-step estimate of Q: n rewards, and the value of the state after them.

    A trajectory that ends earlier has fewer rewards.

    Args:
        rewards: rₜ, shape (T, N).
        next_values: V(sₜ₊₁), and 0 where the episode terminated, (T, N).
        ends: True where the trajectory does not go on with the next row, (T, N).
        gamma: Discount factor γ, in [0, 1].
        steps: n, at least 1.

    Returns:
        Shape (T, N).

    Raises:
        TrustRegionError: If shapes differ, there are no rows, γ is outside [0, 1], or n is below 1.

    Example:
        >>> import torch
        >>> from trpo_optim.rollouts import n_step_returns
        >>> rewards, next_values = torch.ones(3, 1), torch.tensor([[8.0], [8.0], [0.0]])
        >>> ends = torch.tensor([[False], [False], [True]])
        >>> n_step_returns(rewards, next_values, ends, gamma=0.5, steps=2).T
        tensor([[3.5000, 1.5000, 1.0000]])
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
    """Return importance weights of the states in trajectories of an earlier policy.

    The weight of a state is the product of π/π_behaviour over the actions before it. The ratio of
    the state's own action belongs to the surrogate.

    Args:
        log_ratios: ln π(aₜ|sₜ) − ln π_behaviour(aₜ|sₜ), shape (T, N).
        starts: True where an episode begins, (T, N).
        largest: The limit of the weights. A lower limit means less variance and more bias.

    Returns:
        Shape (T, N). The weights are 1 at the start of an episode and of the batch.

    Raises:
        TrustRegionError: If shapes differ, there are no rows, or ``largest`` is not positive.

    Example:
        >>> import torch
        >>> from trpo_optim.rollouts import trajectory_weights
        >>> log_ratios = torch.full((4, 1), 2.0).log()  # each action is twice as likely now
        >>> starts = torch.tensor([[True], [False], [False], [True]])
        >>> trajectory_weights(log_ratios, starts, largest=3.0).T
        tensor([[1., 2., 3., 1.]])

    Source:
        Precup, Sutton & Singh, "Eligibility Traces for Off-Policy Policy Evaluation", ICML 2000.
    """
    _require_rows(log_ratios=log_ratios, starts=starts)
    _require_positive(largest=largest)
    weights = torch.zeros_like(log_ratios)
    before = torch.zeros_like(log_ratios[0])
    for step, ratio in enumerate(log_ratios):
        before = torch.where(starts[step], 0.0, before)
        weights[step] = before
        before = before + ratio
    return weights.exp().clamp(max=largest)


def explained_variance(predictions: Tensor, targets: Tensor) -> float:
    """Return 1 − var(targets − predictions)/var(targets).

    1 is perfect. 0 is as good as predicting the mean of the targets.

    Args:
        predictions: Any shape.
        targets: The same shape.

    Returns:
        A number. NaN if all targets are equal.

    Raises:
        TrustRegionError: If shapes differ or there are no rows.

    Example:
        >>> import torch
        >>> from trpo_optim.rollouts import explained_variance
        >>> targets = torch.tensor([0.0, 1.0, 2.0])
        >>> explained_variance(targets / 2, targets)
        0.75
    """
    _require_one_shape(predictions=predictions, targets=targets)
    spread = targets.double().var(correction=0)
    left = (targets.double() - predictions.double()).var(correction=0)
    return float(1 - left / spread) if spread > 0 else float("nan")


def _discounted(
    terms: Tensor, rest: Tensor, ends: Tensor, fade: float, traces: Tensor | None = None
) -> Tensor:
    """Return Σ fadeˡ termsₜ₊ₗ along each trajectory, with fade · rest after its end.

    With traces, each sum counts in the one before it by the trace of its row.

    Every round doubles how many rows a sum spans, so there are log₂ T rounds (Hillis & Steele,
    "Data parallel algorithms", 1986).
    """
    stop = torch.cat([ends[:-1], torch.ones_like(ends[-1:])])
    sums = torch.where(stop, terms + fade * rest, terms)
    following = terms.new_ones(()) if traces is None else torch.cat([traces[1:], traces[-1:]])
    carry = torch.where(stop, 0.0, fade * following)  # how a sum counts in the one before
    span, most = 1, torch.finfo(carry.dtype).max
    while span < len(terms):
        near, far = carry[:-span], carry[span:]
        cut = near == 0  # nothing comes from beyond an end, not even NaN
        more = torch.where(cut, 0.0, near * sums[span:])
        both = torch.where(cut, 0.0, (near * far).clamp(max=most))
        sums = torch.cat([sums[:-span] + more, sums[-span:]])
        carry = torch.cat([both, torch.zeros_like(carry[-span:])])
        span *= 2
    return sums


def _require_positive(*, largest: float) -> None:
    if not largest > 0:
        raise TrustRegionError(f"largest is {largest!r}; it must be above 0.")


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
    for name, value in values.items():
        require_tensor(name, value)
    shapes = {name: tuple(value.shape) for name, value in values.items()}
    if len(set(shapes.values())) > 1:
        raise TrustRegionError(f"The shapes differ: {shapes}. All must be the same.")
    name, value = next(iter(values.items()))
    if value.numel() == 0:
        raise TrustRegionError(
            f"{name} is empty (shape {tuple(value.shape)}). Pass at least one row."
        )
