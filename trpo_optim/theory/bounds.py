"""How far apart two policies are, and what the paper guarantees of one by the other."""

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
    """Return max over s of ½ Σ |π_old(a|s) − π_new(a|s)|, of policies (S, A)."""
    _require_policies(old, new)
    return float((old - new).abs().sum(1).max() / 2)


def kl_by_state(old: Tensor, new: Tensor) -> Tensor:
    """Return KL(π_old(·|s) ‖ π_new(·|s)) in nats: policies (…, S, A), shape (…, S)."""
    kl = (torch.xlogy(old, old) - torch.xlogy(old, new)).sum(-1)
    return kl.clamp_min(0.0)  # rounding may bring it below


def max_kl_divergence(old: Tensor, new: Tensor) -> float:
    """Return max over s of KL(π_old(·|s) ‖ π_new(·|s)) in nats, of policies (S, A)."""
    _require_policies(old, new)
    return float(kl_by_state(old, new).max())


def mean_kl_divergence(mdp: TabularMDP, old: Tensor, new: Tensor) -> float:
    """Return the KL averaged over the normalised visitation of the old policy, in nats."""
    weights = (1 - mdp.gamma) * mdp.visitation(old)
    return float(weights @ kl_by_state(old, new))


def _require_policies(old: Tensor, new: Tensor) -> None:
    if old.shape != new.shape:
        raise TrustRegionError(
            f"The policies have shapes {tuple(old.shape)} and {tuple(new.shape)}; both are (S, A)."
        )
    require_probabilities("The old policy", old)
    require_probabilities("The new policy", new)


def penalty_coefficient(advantage: float, gamma: float) -> float:
    """Return C = 4εγ/(1 − γ)².

    Args:
        advantage: ε = max |A_π(s, a)|.
        gamma: Discount factor γ, in [0, 1).

    Returns:
        The price of a nat of the maximal KL, in units of return.

    Raises:
        TrustRegionError: If γ is outside its range, or ε negative.

    Source:
        Schulman et al. (2015), equation 9.
    """
    if not 0 <= gamma < 1:
        raise TrustRegionError(f"gamma is {gamma!r}; it must be in [0, 1).")
    if not advantage >= 0:
        raise TrustRegionError(f"advantage is {advantage!r}; max |A| cannot be negative.")
    return 4 * advantage * gamma / (1 - gamma) ** 2


def lower_bound(mdp: TabularMDP, old: Tensor, new: Tensor) -> float:
    """Return L_old(new) − C · max KL(old ‖ new), which η(new) does not fall below.

    Args:
        mdp: The process.
        old: The policy that advantages and visitation are those of.
        new: The policy that the bound is for.

    Returns:
        A number.

    Source:
        Schulman et al. (2015), theorem 1 and equation 9.
    """
    coefficient = penalty_coefficient(float(mdp.advantages(old).abs().max()), mdp.gamma)
    penalty = coefficient * max_kl_divergence(old, new) if coefficient else 0.0
    return mdp.surrogate(old, new) - penalty


def conservative_lower_bound(mdp: TabularMDP, old: Tensor, other: Tensor, share: float) -> float:
    """Return what η((1 − α) π_old + α π_other) does not fall below.

    L_old(new) − 2εγα²/(1 − γ)², ε = max over s of |E over a of π_other [A_old(s, a)]|.

    Args:
        mdp: The process.
        old: The present policy.
        other: What it is mixed with.
        share: α, in [0, 1].

    Returns:
        A number.

    Raises:
        TrustRegionError: If α is outside its range.

    Source:
        Kakade & Langford (2002); Schulman et al. (2015), equation 6.
    """
    if not 0 <= share <= 1:
        raise TrustRegionError(f"share is {share!r}; it must be in [0, 1].")
    advantage = float((other * mdp.advantages(old)).sum(1).abs().max())
    loss = 2 * advantage * mdp.gamma * share**2 / (1 - mdp.gamma) ** 2
    return mdp.surrogate(old, (1 - share) * old + share * other) - loss


def state_distribution_bound(time: int, largest_kl: float) -> float:
    """Return t·√(2ε), which Σ |P(s_t = s | old) − P(s_t = s | new)| does not exceed.

    Each step turns at most a share TV ≤ √(ε/2) of the trajectories, by Pinsker's inequality, and
    the L1 distance is at most twice the share of those turned by then.

    Args:
        time: t, steps from the start.
        largest_kl: ε = max over s of KL(π_old(·|s) ‖ π_new(·|s)), in nats.

    Returns:
        A number.

    Raises:
        TrustRegionError: If one of them is negative.
    """
    if time < 0 or not largest_kl >= 0:
        raise TrustRegionError(f"time is {time!r} and largest_kl {largest_kl!r}; both at least 0.")
    return time * math.sqrt(2 * largest_kl)


def improvement_bound(report: StepReport, *, advantage: float, gamma: float) -> float:
    """Return what the theory says of a practical step: improvement/(1 − γ) − C · KL.

    The KL is the largest of a sample, where the closure returned one per sample, else the mean. It
    and the improvement are a batch's estimates, so that this is a bound as far as they are exact;
    and it is almost always far below zero, the paper's reason for a constraint.

    Args:
        report: Of an accepted step whose loss is the surrogate, in units of advantages.
        advantage: ε = max |A|, in the same units.
        gamma: Discount factor γ, in [0, 1).

    Returns:
        A lower bound of the increase of the return from the start, where the visitation is
        normalised to 1/(1 − γ).

    Raises:
        TrustRegionError: If the step was not accepted, or γ or ε are outside their ranges.

    Source:
        Schulman et al. (2015), equations 9 and 11 to 12.
    """
    if not report.accepted:
        raise TrustRegionError(f"The step was not taken ({report.outcome.name}): nothing improved.")
    coefficient = penalty_coefficient(advantage, gamma)
    kl = report.kl if math.isnan(report.largest_kl) else report.largest_kl
    return report.improvement / (1 - gamma) - coefficient * kl
