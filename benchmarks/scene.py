"""A policy, a batch of it, and the steps on them."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import agent
import gymnasium as gym
import torch
import train
from timing import Job, putting_back
from torch import Tensor, nn
from torch.distributions import kl_divergence

from trpo_optim import StepReport, TrustRegionOptimizer, sampled_kl
from trpo_optim.algorithm.conjugate_gradient import Solution, conjugate_gradient
from trpo_optim.closure.evaluation import Closure, Objective
from trpo_optim.closure.parameters import ParameterVector
from trpo_optim.closure.transaction import Transaction
from trpo_optim.curvature.local_model import LocalModel
from trpo_optim.curvature.second_order import second_order

OBSERVATIONS, ACTIONS = 17, 6  # HalfCheetah's
RADIUS, DAMPING, ITERATIONS = 0.01, 0.1, 10
SOLVER: dict[str, Any] = {"max_kl": RADIUS, "damping": DAMPING, "cg_tolerance": 0.0}
"""Settings that other libraries have, too."""


class Scene:
    """A policy, a batch of it, and the jobs on them. All that lies on the policy's device.

    Args:
        policy: Maps observations to a distribution. It moves, and each job begins at its start.
        observations: The observations, samples first (for a recurrent policy, steps first).
        actions: The actions. None: the policy draws them.
        advantages: One for each action. None: noise.
    """

    def __init__(
        self,
        policy: nn.Module,
        observations: Tensor,
        actions: Tensor | None = None,
        advantages: Tensor | None = None,
    ) -> None:
        self.policy, self.observations = policy, observations
        self.parameters = list(policy.parameters())  # FSDP gathers them as soon as the policy runs
        self.reset = putting_back(self.parameters)
        with torch.no_grad():
            old = policy(observations)
            self.actions = old.sample() if actions is None else actions
            self.old_log_prob = old.log_prob(self.actions)
        noise = torch.randn_like(self.old_log_prob)
        self.advantages = noise if advantages is None else advantages

    def closure(
        self, rows: Any = slice(None), *, third: bool = True, sampled: bool = False
    ) -> Closure:
        """Return a closure on some samples, whose old policy is the present one.

        It returns a third value or not, and the KL in closed form or estimated on the actions.
        """
        observations, actions = self.observations[rows], self.actions[rows]
        advantages, old_log_prob = self.advantages[rows], self.old_log_prob[rows]
        with torch.no_grad():
            old = self.policy(observations)

        def closure() -> Any:
            dist = self.policy(observations)
            log_prob = dist.log_prob(actions)
            loss = -((log_prob - old_log_prob).exp() * advantages).mean()
            if sampled:
                return loss, sampled_kl(old_log_prob, log_prob, low_variance=True), log_prob
            kl = kl_divergence(old, dist).mean()
            return (loss, kl, dist) if third else (loss, kl)

        return closure

    def gradient(self, micro_batches: int = 1) -> Job:
        """Evaluate the closure and differentiate its loss: the unit of costs, if in one piece."""
        closures = self._closures(micro_batches, third=True)

        def differentiate() -> None:
            for closure in closures:
                torch.autograd.grad(closure()[0], self.parameters)

        return Job(differentiate, self.reset)

    def update(
        self, *, third: bool = True, share: float = 1.0, micro_batches: int = 1, **settings: Any
    ) -> Job:
        """Return a job that takes one step and returns its report.

        A share of the batch gives the curvature. The settings are the optimizer's, besides those of
        ``SOLVER``.
        """
        optimizer = TrustRegionOptimizer(self.parameters, **(SOLVER | settings))
        closures = self._closures(micro_batches, third=third)
        part = None
        if share < 1:
            part = self.closure(slice(int(share * len(self.observations))), third=third)
        whole = closures if micro_batches > 1 else closures[0]
        return Job(lambda: optimizer.step(whole, curvature=part), self.reset)

    def model(self, rows: Any = slice(None), *, gradient: bool = True, **how: Any) -> LocalModel:
        """Return what a solve sees: the gradient and the products. A reset ends its graph."""
        vector = ParameterVector(self.parameters)
        objective = Objective(self.closure(rows, **how), vector, Transaction(vector))
        return second_order(objective, gradient=gradient)

    def _closures(self, micro_batches: int, *, third: bool) -> list[Closure]:
        self.reset()  # whose policy is the old one
        size = len(self.observations) // micro_batches
        parts = [slice(size * index, size * (index + 1)) for index in range(micro_batches)]
        return [self.closure(rows, third=third) for rows in parts]


def solved(
    product: Callable[[Tensor], Tensor],
    gradient: Tensor,
    *,
    damping: float | None = None,
    iterations: int = ITERATIONS,
) -> Solution:
    """Return the package's own solution of (F + λI) x = g; λ is relative to F by default."""
    return conjugate_gradient(
        product, gradient, damping=damping, iterations=iterations, tolerance=0.0
    )


def mlp(hidden: int, samples: int, device: str = "cpu") -> Scene:
    """Return the scene of a Gaussian MLP with two hidden layers, and of random observations."""
    torch.manual_seed(0)
    actions = gym.spaces.Box(-1.0, 1.0, (ACTIONS,))
    policy = agent.Policy(OBSERVATIONS, actions, train.Args(hidden=hidden)).to(device)
    observations = torch.randn(samples, OBSERVATIONS).to(device)
    with torch.no_grad():
        drawn = policy(observations).sample()
    return Scene(policy, observations, drawn, torch.randn(samples).to(device) + drawn[:, 0])


def gain(report: StepReport) -> float:
    """Return a step's improvement over √KL, which hardly depends on the step's length."""
    return report.improvement / math.sqrt(report.kl)
