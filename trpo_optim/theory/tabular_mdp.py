"""A Markov decision process that is solved exactly, with the values of a policy."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from trpo_optim.errors import TrustRegionError

__all__ = ["TabularMDP", "random_mdp", "require_probabilities"]


@dataclass(frozen=True, eq=False)
class TabularMDP:
    """A finite, discounted Markov decision process, in double precision.

    A policy is a tensor ``π(a|s)`` of shape (S, A) whose rows sum to one. Model the end of an
    episode as an absorbing state without reward.

    Attributes:
        transitions: ``P(s'|s, a)``, shape (S, A, S).
        rewards: r(s, a), shape (S, A).
        start: ρ₀(s), shape (S,).
        gamma: Discount factor γ, in [0, 1).

    Raises:
        TrustRegionError: If shapes do not fit, probabilities do not sum to one, rewards are not
            finite, or γ is outside its range.

    Example:
        >>> import torch
        >>> from trpo_optim.theory import TabularMDP
        >>> transitions = torch.ones(1, 2, 1)  # a bandit with two arms
        >>> mdp = TabularMDP(transitions, torch.tensor([[0.0, 1.0]]), torch.ones(1), gamma=0.5)
        >>> policy = torch.tensor([[0.5, 0.5]])
        >>> mdp.expected_return(policy)  # 0.5 / (1 - γ)
        1.0
        >>> mdp.advantages(policy)
        tensor([[-0.5000,  0.5000]], dtype=torch.float64)
    """

    transitions: Tensor
    rewards: Tensor
    start: Tensor
    gamma: float

    def __post_init__(self) -> None:
        """Check the process and bring it to double precision."""
        for name in ("transitions", "rewards", "start"):
            given = getattr(self, name)
            value = given if isinstance(given, Tensor) else torch.tensor(given)
            object.__setattr__(self, name, value.double())
        if self.rewards.dim() != 2 or not self.rewards.numel():
            raise TrustRegionError(
                f"rewards has shape {tuple(self.rewards.shape)}; it must be (states, actions), "
                "with at least one of each."
            )
        states, actions = self.rewards.shape
        expected = {"transitions": (states, actions, states), "start": (states,)}
        for name, shape in expected.items():
            value = getattr(self, name)
            if value.shape != shape:
                raise TrustRegionError(
                    f"{name} has shape {tuple(value.shape)}; with rewards of "
                    f"{(states, actions)} it must be {shape}."
                )
            object.__setattr__(self, name, _probabilities(name, value))
        if not self.rewards.isfinite().all():
            raise TrustRegionError("rewards holds NaN or infinity; every reward must be finite.")
        if not 0 <= self.gamma < 1:
            raise TrustRegionError(
                f"gamma is {self.gamma!r}; it must be in [0, 1), since values are infinite at 1."
            )

    def state_values(self, policy: Tensor) -> Tensor:
        """Return V_π(s) = E[Σ γᵗ r(sₜ, aₜ) | s₀ = s], shape (S,)."""
        chain, rewards = self._under(policy)
        identity = torch.eye(len(chain), dtype=chain.dtype, device=chain.device)
        solution: Tensor = torch.linalg.solve(identity - self.gamma * chain, rewards)
        return solution

    def action_values(self, policy: Tensor) -> Tensor:
        """Return Q_π(s, a), shape (S, A)."""
        return self.rewards + self.gamma * self.transitions @ self.state_values(policy)

    def advantages(self, policy: Tensor) -> Tensor:
        """Return A_π(s, a) = Q_π(s, a) − V_π(s), shape (S, A)."""
        return self.action_values(policy) - self.state_values(policy)[:, None]

    def visitation(self, policy: Tensor) -> Tensor:
        """Return ρ_π(s) = Σ γᵗ P(sₜ = s), shape (S,). It sums to 1/(1 − γ)."""
        chain, _ = self._under(policy)
        identity = torch.eye(len(chain), dtype=chain.dtype, device=chain.device)
        solution: Tensor = torch.linalg.solve((identity - self.gamma * chain).T, self.start)
        return solution

    def state_distribution(self, policy: Tensor, time: int) -> Tensor:
        """Return P(s_t = s) after ``time`` steps, shape (S,)."""
        if time < 0:
            raise TrustRegionError(f"time is {time!r}; it must be at least 0 steps.")
        chain, _ = self._under(policy)
        result: Tensor = self.start @ torch.linalg.matrix_power(chain, time)
        return result

    def expected_return(self, policy: Tensor) -> float:
        """Return η(π) = E[Σ γᵗ r(sₜ, aₜ)] from the start distribution."""
        return float(self.start @ self.state_values(policy))

    def surrogate(self, old: Tensor, new: Tensor) -> float:
        """Return ``L_old(new) = η(old) + Σ ρ_old(s) Σ π_new(a|s) A_old(s, a)``.

        Args:
            old: The policy that gives states and advantages.
            new: The policy that gives actions.

        Returns:
            A number. η(new) would weight by ρ_new instead.

        Source:
            Schulman et al. (2015), equation 3.
        """
        return self.expected_return(old) + float(self.visitation(old) @ self._gained(old, new))

    def return_by_advantages(self, old: Tensor, new: Tensor) -> float:
        """Return ``η(old) + Σ ρ_new(s) Σ π_new(a|s) A_old(s, a)``, which is η(new).

        Args:
            old: The policy that gives advantages.
            new: The policy that gives states and actions.

        Returns:
            A number.

        Source:
            Kakade & Langford (2002); Schulman et al. (2015), equations 1 and 2.
        """
        return self.expected_return(old) + float(self.visitation(new) @ self._gained(old, new))

    def _gained(self, old: Tensor, new: Tensor) -> Tensor:
        """Return Σ π_new(a|s) A_old(s, a), shape (S,)."""
        return (self._policy(new) * self.advantages(old)).sum(1)

    def _under(self, policy: Tensor) -> tuple[Tensor, Tensor]:
        """Return the Markov chain and the rewards that a policy makes of the process."""
        weights = self._policy(policy)
        chain = torch.einsum("sa,sat->st", weights, self.transitions)
        return chain, (weights * self.rewards).sum(1)

    def _policy(self, policy: Tensor) -> Tensor:
        """Return a policy's probabilities, which sum to 1 in double precision."""
        if policy.shape != self.rewards.shape:
            raise TrustRegionError(
                f"The policy has shape {tuple(policy.shape)}; it must be π(a|s) of shape "
                f"{tuple(self.rewards.shape)}."
            )
        return _probabilities("policy", policy)


def _probabilities(name: str, value: Tensor) -> Tensor:
    """Return probabilities that sum to 1 in double precision, of what does so in single."""
    require_probabilities(name, value)
    wide = value.double()
    return wide / wide.sum(-1, keepdim=True)


def require_probabilities(name: str, value: Tensor) -> None:
    """Check that a tensor's last dimension is a probability distribution.

    Args:
        name: What it is called, for the error.
        value: The tensor.

    Raises:
        TrustRegionError: If it is not.
    """
    if not isinstance(value, Tensor):
        raise TrustRegionError(
            f"{name} is a {type(value).__name__}; it must be a tensor. Pass torch.as_tensor of it."
        )
    if not value.dim() or not value.numel():
        raise TrustRegionError(
            f"{name} has shape {tuple(value.shape)}; it must have at least one state and one "
            "action. Pass probabilities whose last dimension sums to 1."
        )
    sums = value.sum(-1, dtype=torch.promote_types(value.dtype, torch.float32))
    allowed = max(1e-6, _rounding(value.dtype))
    if not bool((value >= 0).all()) or float((sums - 1).abs().max()) > allowed:
        raise TrustRegionError(
            f"{name} holds no probabilities: its last dimension must be non-negative and sum to 1. "
            f"The sums range from {float(sums.min()):g} to {float(sums.max()):g}."
        )


def _rounding(dtype: torch.dtype) -> float:
    """Return what rounding may leave of 1 where probabilities of a precision are summed.

    In single precision, rounding of the many terms of a softmax counts. In half precision, that of
    the probabilities themselves does, by at most half of eps.
    """
    if not dtype.is_floating_point:
        return 0.0
    eps = torch.finfo(dtype).eps
    return min(32 * eps, max(1e-5, 2 * eps))


def random_mdp(states: int, actions: int, gamma: float, seed: int) -> TabularMDP:
    """Return a process with random sparse transitions and Gaussian rewards.

    Args:
        states: S.
        actions: A.
        gamma: Discount factor γ.
        seed: The seed of all draws. The global random state does not change.

    Returns:
        The process.

    Example:
        >>> from trpo_optim.theory import random_mdp
        >>> mdp = random_mdp(states=5, actions=3, gamma=0.9, seed=0)
        >>> mdp.rewards.shape
        torch.Size([5, 3])
    """
    generator = torch.Generator("cpu").manual_seed(seed)

    def noise(*shape: int) -> Tensor:
        return torch.rand(shape, generator=generator, device="cpu", dtype=torch.float64).clamp_min(
            1e-12
        )

    # Exponential variables to a power, normalised: from nearly even to nearly deterministic.
    weights = (-noise(states, actions, states).log()) ** 3
    return TabularMDP(
        transitions=weights / weights.sum(-1, keepdim=True),
        rewards=torch.randn(
            (states, actions), generator=generator, device="cpu", dtype=torch.float64
        ),
        start=(start := -noise(states).log()) / start.sum(),
        gamma=gamma,
    )
