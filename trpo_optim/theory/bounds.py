"""Distances between two policies, and the paper's bounds that follow from them."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from trpo_optim.errors import TrustRegionError
from trpo_optim.report import StepReport
from trpo_optim.theory.tabular_mdp import TabularMDP, require_probabilities

__all__ = [
    "conservative_lower_bound",
    "improvement_bound",
    "kl_by_state",
    "lower_bound",
    "max_kl_divergence",
    "max_total_variation",
    "mean_kl_divergence",
    "penalty_coefficient",
    "state_distribution_bound",
]


def max_total_variation(old: Tensor, new: Tensor) -> float:
    """Return max over s of ``½ Σ |π_old(a|s) − π_new(a|s)|``, for policies (S, A).

    Example:
        >>> import torch
        >>> from trpo_optim.theory import max_total_variation
        >>> old, new = torch.tensor([[0.5, 0.5]]), torch.tensor([[0.25, 0.75]])
        >>> max_total_variation(old, new)
        0.25
    """
    _require_policies(old, new)
    return float((old - new).abs().sum(1).max() / 2)


def kl_by_state(old: Tensor, new: Tensor) -> Tensor:
    """Return ``KL(π_old(·|s) ‖ π_new(·|s))`` in nats, shape (…, S), for policies (…, S, A).

    The policies broadcast against each other, except for the last dimension.

    Raises:
        TrustRegionError: If the last dimensions differ or hold no probabilities, or the other ones
            do not broadcast.

    Example:
        >>> import torch
        >>> from trpo_optim.theory import kl_by_state
        >>> old = torch.tensor([[0.5, 0.5], [0.5, 0.5]])
        >>> kl_by_state(old, torch.tensor([[0.5, 0.5], [0.25, 0.75]]))
        tensor([0.0000, 0.1438])
    """
    require_probabilities("The old policy", old)
    require_probabilities("The new policy", new)
    pairs = zip(reversed(old.shape[:-1]), reversed(new.shape[:-1]), strict=False)
    broadcast = all(ours == theirs or 1 in (ours, theirs) for ours, theirs in pairs)
    if old.shape[-1:] != new.shape[-1:] or not broadcast:
        raise TrustRegionError(
            f"The policies have shapes {tuple(old.shape)} and {tuple(new.shape)}; the last "
            "dimensions, of actions, must be the same, and the other ones must broadcast. Pass two "
            "policies of the same states, (S, A)."
        )
    kl = (torch.xlogy(old, old) - torch.xlogy(old, new)).sum(-1)
    return kl.clamp_min(0.0)  # rounding may bring it below


def max_kl_divergence(old: Tensor, new: Tensor) -> float:
    """Return max over s of ``KL(π_old(·|s) ‖ π_new(·|s))`` in nats, for policies (S, A).

    Example:
        >>> import torch
        >>> from trpo_optim.theory import max_kl_divergence
        >>> old = torch.tensor([[0.5, 0.5], [0.5, 0.5]])
        >>> round(max_kl_divergence(old, torch.tensor([[0.5, 0.5], [0.25, 0.75]])), 4)
        0.1438
    """
    _require_policies(old, new)
    return float(kl_by_state(old, new).max())


def mean_kl_divergence(mdp: TabularMDP, old: Tensor, new: Tensor) -> float:
    """Return the KL averaged over the normalised visitation of the old policy, in nats.

    Example:
        >>> import torch
        >>> from trpo_optim.theory import max_kl_divergence, mean_kl_divergence, random_mdp
        >>> mdp = random_mdp(states=2, actions=2, gamma=0.9, seed=0)
        >>> old = torch.full((2, 2), 0.5, dtype=torch.float64)
        >>> new = torch.tensor([[0.5, 0.5], [0.25, 0.75]], dtype=torch.float64)
        >>> 0 < mean_kl_divergence(mdp, old, new) < max_kl_divergence(old, new)
        True
    """
    _require_policies(old, new)
    weights = (1 - mdp.gamma) * mdp.visitation(old)
    return float(torch.where(weights > 0, weights * kl_by_state(old, new), 0.0).sum())


def _require_policies(old: Tensor, new: Tensor) -> None:
    if old.shape != new.shape:
        raise TrustRegionError(
            f"The policies have shapes {tuple(old.shape)} and {tuple(new.shape)}; both must be the "
            "same (S, A)."
        )
    require_probabilities("The old policy", old)
    require_probabilities("The new policy", new)


def penalty_coefficient(advantage: float, gamma: float) -> float:
    """Return C = 4εγ/(1 − γ)².

    Args:
        advantage: ``ε = max |A_π(s, a)|``.
        gamma: Discount factor γ, in [0, 1).

    Returns:
        The penalty per nat of the maximal KL, in units of return.

    Raises:
        TrustRegionError: If γ is outside its range, or ε is negative.

    Example:
        >>> from trpo_optim.theory import penalty_coefficient
        >>> penalty_coefficient(advantage=1.0, gamma=0.5)
        8.0

    Source:
        Schulman et al. (2015), equation 9.
    """
    if not 0 <= gamma < 1:
        raise TrustRegionError(f"gamma is {gamma!r}; it must be in [0, 1).")
    if not advantage >= 0:
        raise TrustRegionError(f"advantage is {advantage!r}; max |A| cannot be negative.")
    return 4 * advantage * gamma / (1 - gamma) ** 2


def lower_bound(mdp: TabularMDP, old: Tensor, new: Tensor) -> float:
    """Return L_old(new) − C · max KL(old ‖ new), a lower bound of η(new).

    Args:
        mdp: The process.
        old: The policy that gives advantages and visitation.
        new: The policy of the bound.

    Returns:
        A number.

    Example:
        >>> import torch
        >>> from trpo_optim.theory import lower_bound, random_mdp
        >>> mdp = random_mdp(states=5, actions=3, gamma=0.9, seed=0)
        >>> old, new = torch.rand(2, 5, 3, dtype=torch.float64).softmax(-1)
        >>> lower_bound(mdp, old, new) <= mdp.expected_return(new)
        True

    Source:
        Schulman et al. (2015), theorem 1 and equation 9.
    """
    coefficient = penalty_coefficient(float(mdp.advantages(old).abs().max()), mdp.gamma)
    penalty = coefficient * max_kl_divergence(old, new) if coefficient else 0.0
    return mdp.surrogate(old, new) - penalty


def conservative_lower_bound(mdp: TabularMDP, old: Tensor, other: Tensor, share: float) -> float:
    """Return a lower bound of η(new) for the mixture new = (1 − α) π_old + α π_other.

    The bound is L_old(new) − 2εγα²/(1 − γ)², with ε = max over s of
    ``|Σ π_other(a|s) A_old(s, a)|``.

    Args:
        mdp: The process.
        old: The present policy.
        other: The policy to mix in.
        share: α, in [0, 1].

    Returns:
        A number.

    Raises:
        TrustRegionError: If α is outside its range.

    Example:
        >>> import torch
        >>> from trpo_optim.theory import conservative_lower_bound, random_mdp
        >>> mdp = random_mdp(states=5, actions=3, gamma=0.9, seed=0)
        >>> old, other = torch.rand(2, 5, 3, dtype=torch.float64).softmax(-1)
        >>> bound = conservative_lower_bound(mdp, old, other, share=0.1)
        >>> bound <= mdp.expected_return(0.9 * old + 0.1 * other)
        True

    Source:
        Kakade & Langford (2002); Schulman et al. (2015), equation 6.
    """
    if not 0 <= share <= 1:
        raise TrustRegionError(f"share is {share!r}; it must be in [0, 1].")
    advantage = float((other * mdp.advantages(old)).sum(1).abs().max())
    loss = 2 * advantage * mdp.gamma * share**2 / (1 - mdp.gamma) ** 2
    return mdp.surrogate(old, (1 - share) * old + share * other) - loss


def state_distribution_bound(time: int, largest_kl: float) -> float:
    """Return t·√(2ε), an upper bound of ``Σ |P(s_t = s | old) − P(s_t = s | new)|``.

    In each step, at most a share TV ≤ √(ε/2) of the trajectories separates, by Pinsker's
    inequality. The L1 distance is at most twice the share that has separated.

    Args:
        time: t, steps from the start.
        largest_kl: ε = max over s of ``KL(π_old(·|s) ‖ π_new(·|s))``, in nats.

    Returns:
        A number.

    Raises:
        TrustRegionError: If one of them is negative.

    Example:
        >>> from trpo_optim.theory import state_distribution_bound
        >>> state_distribution_bound(time=3, largest_kl=0.02)
        0.6000000000000001
    """
    if time < 0 or not largest_kl >= 0:
        raise TrustRegionError(
            f"time is {time!r}, largest_kl is {largest_kl!r}; both must be >= 0."
        )
    return time * math.sqrt(2 * largest_kl)


def improvement_bound(report: StepReport, *, advantage: float, gamma: float) -> float:
    """Return the theory's bound for a practical step, improvement/(1 − γ) − C · KL.

    The KL is the largest KL of a sample if the closure returned one KL per sample, else the mean.
    KL and improvement are estimates from a batch, and the bound is as exact as they are. It is
    almost always far below zero: the paper's reason for a constraint.

    Args:
        report: The report of an accepted step whose loss is the surrogate, in units of advantages.
        advantage: ``ε = max |A|``, in the same units.
        gamma: Discount factor γ, in [0, 1).

    Returns:
        A lower bound of the increase of the return from the start. The visitation sums to
        1/(1 − γ).

    Raises:
        TrustRegionError: If the step was not accepted, or γ or ε is outside its range.

    Example:
        >>> from trpo_optim import Outcome, StepReport
        >>> from trpo_optim.theory import improvement_bound
        >>> report = StepReport(Outcome.ACCEPTED, improvement=0.125, kl=0.01)
        >>> improvement_bound(report, advantage=2.0, gamma=0.5)  # 0.25 - 16 · 0.01
        0.09

    Source:
        Schulman et al. (2015), equations 9 and 11 to 12.
    """
    if not report.accepted:
        raise TrustRegionError(
            f"The step was not taken ({report.outcome.name}). Pass an accepted one."
        )
    coefficient = penalty_coefficient(advantage, gamma)
    kl = report.kl if math.isnan(report.largest_kl) else report.largest_kl
    return report.improvement / (1 - gamma) - coefficient * kl
