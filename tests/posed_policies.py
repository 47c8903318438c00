"""A small policy of any family, its closure, and its local model with the third value."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from devices import manual_seed
from families import Make
from networks import SAMPLES
from torch import Tensor, nn
from torch.distributions import Distribution, kl_divergence

from trpo_optim.closure.evaluation import Objective
from trpo_optim.closure.parameters import ParameterVector
from trpo_optim.closure.transaction import Transaction
from trpo_optim.curvature.local_model import LocalModel
from trpo_optim.curvature.second_order import second_order


class Policy(nn.Module):
    """A small network and three free parameters, which ``make`` turns into a distribution."""

    def __init__(self, make: Make) -> None:
        super().__init__()
        self.network = nn.Sequential(nn.Linear(4, 3), nn.Tanh(), nn.Linear(3, 6))
        self.free = nn.Parameter(torch.tensor([-0.3, 0.1, 0.2]))
        self.make = make

    def forward(self, observation: Tensor) -> Distribution:
        return self.make(self.network(observation), self.free)


Third = Callable[[Any], Any]


Divergence = Callable[[Any, Any], Tensor]


Reduce = Callable[[Tensor], Tensor]


def masked(kl: Tensor) -> Tensor:
    mask = (torch.arange(len(kl)) % 3 > 0).to(kl)
    return (kl.reshape(len(kl), -1).sum(1) * mask).sum() / mask.sum()


def posed(
    make: Make,
    third: Third | None = lambda dist: dist,
    *,
    reduce: Reduce = Tensor.mean,
    divergence: Divergence = kl_divergence,
    dtype: torch.dtype = torch.float64,
) -> tuple[Policy, Callable[[], Any]]:
    """Return a policy with a distribution of that kind, and its closure."""
    manual_seed(0)
    policy = Policy(make).to(dtype)
    observations = torch.randn(SAMPLES, 4, dtype=dtype)
    with torch.no_grad():
        old = policy(observations)
        actions = old.sample()
        old_log_prob = old.log_prob(actions)
        advantages = torch.randn_like(old_log_prob)

    def closure() -> Any:
        dist = policy(observations)
        ratio = (dist.log_prob(actions) - old_log_prob).exp()
        pair = -(ratio * advantages).mean(), reduce(divergence(old, dist))
        return pair if third is None else (*pair, third(dist))

    return policy, closure


@contextmanager
def linearized(
    make: Make, third: Third | None = lambda dist: dist, **options: Any
) -> Iterator[tuple[LocalModel, Policy, Callable[[], Any]]]:
    """Yield the local model, the policy and its closure."""
    policy, closure = posed(make, third, **options)
    vector = ParameterVector(policy.parameters())
    with Transaction(vector) as transaction:
        yield second_order(Objective(closure, vector, transaction)), policy, closure


def dense(model: LocalModel) -> Tensor:
    return torch.stack([model.product(row) for row in torch.eye(len(model.gradient)).double()])


def dense_hessian(closure: Callable[[], Any], policy: nn.Module) -> Tensor:
    """Return the Hessian of the KL, row by row, by plain double backward."""
    parameters = list(policy.parameters())
    slopes = torch.autograd.grad(
        closure()[1], parameters, create_graph=True, materialize_grads=True
    )
    rows = [
        torch.autograd.grad(entry, parameters, retain_graph=True, materialize_grads=True)
        if entry.requires_grad
        else [torch.zeros_like(each) for each in parameters]
        for entry in torch.cat([slope.reshape(-1) for slope in slopes])
    ]
    return torch.stack([torch.cat([each.reshape(-1) for each in row]) for row in rows])
