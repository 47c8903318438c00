"""The paper's algorithms, solved exactly on tabular problems."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from trpo_optim.errors import TrustRegionError
from trpo_optim.theory.bounds import penalty_coefficient
from trpo_optim.theory.tabular_mdp import TabularMDP

__all__ = [
    "conservative_step",
    "constrained_step",
    "monotonic_step",
    "penalised_step",
    "policy_iteration_step",
]


def policy_iteration_step(mdp: TabularMDP, policy: Tensor) -> Tensor:
    """Return the greedy policy: a trust-region step without a constraint.

    Args:
        mdp: The process.
        policy: The present policy, (S, A).

    Returns:
        A deterministic policy that takes the action with the largest Q, the first of those that are
        equal up to rounding.

    Example:
        >>> import torch
        >>> from trpo_optim.theory import policy_iteration_step, random_mdp
        >>> mdp = random_mdp(states=5, actions=3, gamma=0.9, seed=0)
        >>> policy = torch.full((5, 3), 1 / 3, dtype=torch.float64)
        >>> greedy = policy_iteration_step(mdp, policy)
        >>> mdp.expected_return(greedy) > mdp.expected_return(policy)
        True
    """
    values = mdp.action_values(policy)
    rounding = 8 * torch.finfo(values.dtype).eps * float(values.abs().max())
    best = (values >= values.amax(1, keepdim=True) - rounding).int().argmax(1)
    return torch.nn.functional.one_hot(best, policy.shape[1]).double()


def conservative_step(mdp: TabularMDP, policy: Tensor) -> Tensor:
    """Mix the present policy with the greedy one, with the share that maximises the lower bound.

    Args:
        mdp: The process.
        policy: The present policy, (S, A).

    Returns:
        (1 − α) π + α π', where α ≤ 1 maximises the lower bound.

    Example:
        >>> import torch
        >>> from trpo_optim.theory import conservative_step, random_mdp
        >>> mdp = random_mdp(states=5, actions=3, gamma=0.9, seed=0)
        >>> policy = torch.full((5, 3), 1 / 3, dtype=torch.float64)
        >>> mixed = conservative_step(mdp, policy)
        >>> mdp.expected_return(mixed) > mdp.expected_return(policy)
        True

    Source:
        Kakade & Langford (2002); Schulman et al. (2015), equations 5 and 6.
    """
    other = policy_iteration_step(mdp, policy)
    gained = (other * mdp.advantages(policy)).sum(1)
    slope = float(mdp.visitation(policy) @ gained)
    bend = 4 * float(gained.abs().max()) * mdp.gamma / (1 - mdp.gamma) ** 2
    share = 1.0 if bend == 0 else min(1.0, max(0.0, slope / bend))
    return (1 - share) * policy + share * other


def constrained_step(mdp: TabularMDP, policy: Tensor, radius: float) -> Tensor:
    """Maximise L_π subject to ``KL(π(·|s) ‖ π_new(·|s)) ≤ δ`` in every state.

    Each state is solved on its own: ``π_new(a|s) = λ π(a|s) / (ν − A(s, a))``, with ν above every
    advantage. The KL falls as ν grows.

    Args:
        mdp: The process.
        policy: The present policy, (S, A), positive everywhere.
        radius: δ ≥ 0, in nats.

    Returns:
        The new policy, (S, A).

    Raises:
        TrustRegionError: If δ is negative, or the policy rules an action out.

    Example:
        >>> import torch
        >>> from trpo_optim.theory import constrained_step, max_kl_divergence, random_mdp
        >>> mdp = random_mdp(states=5, actions=3, gamma=0.9, seed=0)
        >>> policy = torch.full((5, 3), 1 / 3, dtype=torch.float64)
        >>> new = constrained_step(mdp, policy, radius=0.01)
        >>> round(max_kl_divergence(policy, new), 6)
        0.01

    Source:
        Schulman et al. (2015), equation 11.
    """
    if not radius >= 0:
        raise TrustRegionError(f"radius is {radius!r}; it must be at least 0.")
    _require_positive(policy)
    tilt = _Tilt.towards(mdp.advantages(policy), policy)
    return tilt.policy(tilt.margins(tilt.widths.new_tensor(radius)))


def penalised_step(mdp: TabularMDP, policy: Tensor, coefficient: float) -> Tensor:
    """Maximise L_π(π_new) − C · max KL(π ‖ π_new) over all policies.

    For a given largest KL, ``constrained_step`` gives the best policy. Its gain is a concave
    function of the radius. At the best radius, its slope is C. The slope is the sum of the states'
    multipliers, weighted by their visitation.

    Args:
        mdp: The process.
        policy: The present policy, (S, A), positive everywhere.
        coefficient: C ≥ 0, in units of return per nat.

    Returns:
        The new policy, (S, A).

    Raises:
        TrustRegionError: If C is negative, or the policy rules an action out.

    Example:
        >>> import torch
        >>> from trpo_optim.theory import max_kl_divergence, penalised_step, random_mdp
        >>> mdp = random_mdp(states=5, actions=3, gamma=0.9, seed=0)
        >>> policy = torch.full((5, 3), 1 / 3, dtype=torch.float64)
        >>> cheap, dear = (penalised_step(mdp, policy, each) for each in (10.0, 100.0))
        >>> max_kl_divergence(policy, cheap) > max_kl_divergence(policy, dear)
        True
    """
    if not coefficient >= 0:
        raise TrustRegionError(f"coefficient is {coefficient!r}; it must be at least 0.")
    _require_positive(policy)
    tilt, visits = _Tilt.towards(mdp.advantages(policy), policy), mdp.visitation(policy)

    def dear(logs: Tensor) -> Tensor:  # the slope falls with the radius
        return (tilt.prices(tilt.margins(logs.exp())) @ visits) >= coefficient

    least, most = map(mdp.rewards.new_tensor, (_LEAST, _MOST))
    low, high = map(float, _narrowed(dear, least, most, rounds=9))
    radius = math.exp((low + high) / 2) if high > _LEAST else 0.0
    return constrained_step(mdp, policy, radius)


def monotonic_step(mdp: TabularMDP, policy: Tensor) -> Tensor:
    """Take one iteration of Algorithm 1. It never lowers the return.

    Args:
        mdp: The process.
        policy: The present policy, (S, A), positive everywhere.

    Returns:
        The maximiser of L_π − C · max KL, with C = 4εγ/(1 − γ)².

    Example:
        >>> import torch
        >>> from trpo_optim.theory import lower_bound, monotonic_step, random_mdp
        >>> mdp = random_mdp(states=5, actions=3, gamma=0.9, seed=0)
        >>> policy = torch.full((5, 3), 1 / 3, dtype=torch.float64)
        >>> better = monotonic_step(mdp, policy)
        >>> mdp.expected_return(better) >= lower_bound(mdp, policy, better)
        True

    Source:
        Schulman et al. (2015), algorithm 1.
    """
    largest = float(mdp.advantages(policy).abs().max())
    return penalised_step(mdp, policy, penalty_coefficient(largest, mdp.gamma))


_LEAST, _MOST = -60.0, 5.0
"""Logarithms of the least and the largest radius of a penalised step, in nats."""

_PLACES = 16
"""In how many places a bracket is evaluated, from its lower to its upper end."""


def _require_positive(policy: Tensor) -> None:
    if not bool((policy > 0).all()):
        raise TrustRegionError(
            "The policy rules out an action, so that the KL of one that does not is infinite. Mix "
            "it with the uniform policy."
        )


@dataclass(frozen=True)
class _Tilt:
    """The policies π_new ∝ π / (1 + gap / margin), which gain most for their KL in every state.

    A margin is that of ν above the best action; margins and gaps are in units of the width.

    Attributes:
        old: π, (A, S): torch sums fastest over the first dimension.
        gaps: How far an action's advantage is below the best, from 0 to 1, (A, S).
        widths: How far the advantages are apart, (S,).
    """

    old: Tensor
    gaps: Tensor
    widths: Tensor

    @classmethod
    def towards(cls, advantages: Tensor, old: Tensor) -> _Tilt:
        gaps = advantages.amax(1, keepdim=True) - advantages
        widths = gaps.amax(1)
        relative = (gaps / widths[:, None]).nan_to_num()  # where all are the same, no gaps
        return cls(old.T.contiguous(), relative.T.contiguous(), widths)

    def policy(self, log_margins: Tensor) -> Tensor:
        """Return the policy for margins of (S,)."""
        _, weights = self._kept(log_margins)
        return (weights / weights.sum(0)).T

    def prices(self, log_margins: Tensor) -> Tensor:
        """Return what a nat is worth in each state, (…, S)."""
        _, weights = self._kept(log_margins)
        return self.widths * log_margins.exp() / weights.sum(0)

    def margins(self, radii: Tensor) -> Tensor:
        """Return the ln margins whose policies have given KLs, (…), in every state, (…, S)."""

        def outside(log_margins: Tensor) -> Tensor:
            kept, weights = self._kept(log_margins)
            terms = kept.log().neg_().add_(weights.sum(0).log())
            return terms.mul_(_over(self.old, log_margins)).sum(0) > radii[..., None]

        high = self.widths.new_full((*radii.shape, len(self.widths)), 80.0)  # π itself
        return _narrowed(outside, -high, high, rounds=12)[1]  # from the best action alone

    def _kept(self, log_margins: Tensor) -> tuple[Tensor, Tensor]:
        """Return what is kept of each action, and of its probability, (A, …, S)."""
        kept = (_over(self.gaps, log_margins) * log_margins.neg().exp_()).add_(1).reciprocal_()
        return kept, kept * _over(self.old, log_margins)


def _over(table: Tensor, like: Tensor) -> Tensor:
    """Return a table of (A, S) as (A, …, S), to go with what is (…, S)."""
    return table.view(len(table), *[1] * (like.ndim - 1), -1)


def _narrowed(
    holds: Callable[[Tensor], Tensor], low: Tensor, high: Tensor, rounds: int
) -> tuple[Tensor, Tensor]:
    """Close in on the places where a condition ends to hold, by a factor of 15 a round.

    Args:
        holds: Says of places, (16, …), whether it holds; once it does not, it does not above.
        low: Where to begin, (…).
        high: Where to end, (…).
        rounds: How often to look.

    Returns:
        The last place where it holds and the first where it does not; both ``low`` or both
        ``high`` where there is no such place.
    """
    shares = torch.linspace(0, 1, _PLACES, dtype=low.dtype, device=low.device)
    shares = shares.view(-1, *[1] * low.ndim)
    for _ in range(rounds):
        places = low + (high - low) * shares
        count = holds(places).sum(0, keepdim=True)
        low, high = (
            places.gather(0, index.clamp(0, _PLACES - 1))[0] for index in (count - 1, count)
        )
    return low, high
