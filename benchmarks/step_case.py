"""One policy with the batch that a step is taken on, and the held-out one that it is judged on."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from real_batches import Pool, RealBatch
from torch import Tensor
from torch.distributions import kl_divergence
from torch.func import functional_call, jacrev, vmap

from trpo_optim import sampled_kl
from trpo_optim.algorithm.conjugate_gradient import conjugate_gradient
from trpo_optim.closure.evaluation import Objective
from trpo_optim.closure.parameters import ParameterVector
from trpo_optim.closure.transaction import Transaction
from trpo_optim.curvature.second_order import second_order

RADIUS = 0.01
Product = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Gains:
    """What a direction gains at the radius: the fall of the surrogate loss."""

    own: float
    held_out: float


class Case:
    """A policy, the batch that the step is taken on, and the one that it is judged on."""

    def __init__(self, pool: Pool, rollouts: Sequence[int]) -> None:
        self.pool = pool
        self.own, self.held_out = pool.split(rollouts)
        self.policy, self._moved = copy.deepcopy(pool.policy), copy.deepcopy(pool.policy)
        self.vector = ParameterVector(self.policy.parameters())
        self._moved_vector = ParameterVector(self._moved.parameters())
        self.origin = self.vector.gather([each.detach() for each in self.vector.parameters])
        self.closure = closure(self.policy, self.own)
        model = second_order(Objective(self.closure, self.vector, Transaction(self.vector)))
        self.product = model.product
        self.uphill = -model.gradient / model.gradient.norm()
        self._judges = [closure(self._moved, batch) for batch in (self.own, self.held_out)]
        self._start = [self._at(torch.zeros_like(self.origin), judge)[0] for judge in self._judges]

    def solved(
        self, damping: float | None, iterations: int, product: Product | None = None
    ) -> Tensor:
        """Return the package's own solution; without a product, with that of all own rows."""
        return conjugate_gradient(
            product or self.product,
            self.uphill,
            damping=damping,
            iterations=iterations,
            tolerance=0.0,
        ).x

    def product_on(self, rows: Tensor, *, sampled: bool = False) -> Product:
        """Return the Fisher-vector product of some rows of the own batch."""
        part = closure(self.policy, self.own[rows], sampled=sampled)
        objective = Objective(part, self.vector, Transaction(self.vector))
        return second_order(objective, gradient=False).product

    def kl(self, step: Tensor) -> float:
        """Return the KL of a step on the own batch."""
        return self._at(step, self._judges[0])[1]

    def gains(self, direction: Tensor) -> Gains:
        """Scale a direction until the KL on its own batch is the radius; return the gains there."""
        direction = direction.float()
        curvature = float(direction.dot(self.product(direction)))
        low, high = 0.0, math.inf
        scale = math.sqrt(2 * RADIUS / curvature)
        for _ in range(40):
            kl = self.kl(scale * direction)
            if abs(kl / RADIUS - 1) < 1e-3:
                break
            low, high = (low, scale) if kl > RADIUS else (scale, high)
            guess = scale * math.sqrt(RADIUS / kl)
            scale = guess if low < guess < high else min((low + high) / 2, 2 * guess)
        own, held_out = (
            start - self._at(scale * direction, judge)[0]
            for start, judge in zip(self._start, self._judges, strict=True)
        )
        return Gains(own, held_out)

    @torch.no_grad()
    def _at(self, step: Tensor, judge: Callable[[], Any]) -> tuple[float, float]:
        self._moved_vector.write(self.vector.scatter(self.origin + step))
        loss, kl, _ = judge()
        return loss.item(), kl.item()


def closure(policy: Any, batch: RealBatch, *, sampled: bool = False) -> Callable[[], Any]:
    """Return a policy's closure on a batch; its present self is the old policy.

    Args:
        policy: The policy.
        batch: The batch.
        sampled: Whether the KL is estimated on the actions.
    """
    with torch.no_grad():
        old = policy(batch.observations)
        old_log_prob = old.log_prob(batch.actions)

    def values() -> Any:
        dist = policy(batch.observations)
        new_log_prob = dist.log_prob(batch.actions)
        loss = -((new_log_prob - old_log_prob).exp() * batch.advantages).mean()
        if sampled:
            return loss, sampled_kl(old_log_prob, new_log_prob, low_variance=True), new_log_prob
        return loss, kl_divergence(old, dist).mean(), dist

    return values


def dense_fisher(policy: Any, observations: Tensor) -> Tensor:
    """Return the Fisher matrix, from one Jacobian per observation, summed in float64; (n, n)."""
    names = [name for name, _ in policy.named_parameters()]
    weights = {name: each.detach() for name, each in policy.network.named_parameters()}

    def outputs(parameters: dict[str, Tensor], observation: Tensor) -> Tensor:
        result: Tensor = functional_call(policy.network, parameters, (observation,))
        return result

    n = sum(each.numel() for each in policy.parameters())
    first = 0 if policy.discrete else policy.log_std.numel() * (names[0] == "log_std")
    size = sum(each.numel() for each in weights.values())
    fisher = torch.zeros(n, n, dtype=torch.float64)
    jacobian = vmap(jacrev(outputs), (None, 0))
    for rows in observations.split(512):
        pieces = jacobian(weights, rows)
        flat = torch.cat([pieces[name].flatten(2) for name in weights], -1)  # (rows, outputs, size)
        if policy.discrete:
            p = policy.network(rows).detach().softmax(-1)
            root = torch.diag_embed(p.sqrt()) - p.sqrt()[:, :, None] * p[:, None, :]
            flat = root @ flat
        else:
            flat /= policy.log_std.detach().exp()[:, None]
        flat = flat.flatten(0, 1)
        fisher[first : first + size, first : first + size] += (flat.T @ flat).double()
    fisher /= len(observations)
    if not policy.discrete:
        rest = torch.ones(n, dtype=torch.bool)
        rest[first : first + size] = False
        fisher.diagonal()[rest] = 2.0
    return fisher
