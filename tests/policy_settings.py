"""A policy of any network and family with what its old self did, and the closure on both."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from devices import random_state, set_random_state
from families import Family
from networks import SAMPLES, Network
from torch import Tensor, nn
from torch.distributions import Laplace
from torch.nn.attention import SDPBackend, sdpa_kernel

from trpo_optim import (
    frozen,
    log_prob,
    mean_kl,
    sample,
    sampled_kl,
)
from trpo_optim.closure.parameters import ParameterVector

pytestmark = pytest.mark.filterwarnings(
    "ignore:The PyTorch API of nested tensors", "ignore:nested_from_padded CUDA kernels"
)


class Policy(nn.Module):
    """A network and three free parameters, made into a policy's distributions by a family."""

    def __init__(self, network: Network, family: Family) -> None:
        super().__init__()
        self.network = network
        self.free = nn.Parameter(torch.tensor([-0.3, 0.1, 0.2]).to(next(network.parameters())))
        self.family = family

    def forward(self) -> Any:
        return self.family.make(self.network(), self.free)


class Setting:
    """A policy, what its old self did, and the closure on both."""

    def __init__(self, policy: Policy) -> None:
        self.policy = policy
        self.trained = [each for each in policy.parameters() if each.requires_grad]
        self.buffers = copy.deepcopy(dict(policy.named_buffers()))
        self.random = random_state()
        device = self.trained[0].device
        self.mask = policy.family.mask(SAMPLES).to(device) if policy.family.mask else None
        with torch.no_grad(), sdpa_kernel(SDPBackend.MATH):  # with the dropout mask of a step
            self.old = frozen(policy())
            self.rewind()
            self.actions = sample(self.old)
            self.old_log_prob = log_prob(self.old, self.actions)
            self.advantages = torch.randn_like(self.old_log_prob)
        self.rewind()

    def rewind(self) -> None:
        """Return buffers and random state to where they were before the old policy acted."""
        set_random_state(self.random)
        for name, buffer in self.policy.named_buffers():
            buffer.copy_(self.buffers[name])

    def closure(self, *, third: bool = True) -> Any:
        dist = self.policy()
        new_log_prob = log_prob(dist, self.actions)
        loss = -((new_log_prob - self.old_log_prob).exp() * self.advantages).mean()
        if self.policy.family.sampled:
            kl = sampled_kl(self.old_log_prob, new_log_prob, low_variance=True)
            parameters = new_log_prob
        else:
            kl = mean_kl(self.old, dist, self.mask)
            parameters = dist
        return (loss, kl, parameters) if third else (loss, kl)

    def fisher_vector_product(self, direction: Tensor, vector: ParameterVector) -> Tensor:
        """Return Fv by central differences of the KL's gradient, or by the score's definition."""
        if self.policy.family.sampled:
            scores = [self.slope(row, vector) for row in range(SAMPLES)]
            rows = torch.stack(scores)
            return rows.T @ (rows @ direction) / SAMPLES
        origin = vector.gather([each.detach() for each in self.trained])
        width = 1e-5 / float(direction.norm())
        ends = []
        for shift in (width, -width):
            vector.write(vector.scatter(origin + shift * direction))
            ends.append(self.slope(None, vector))
        vector.write(vector.scatter(origin))
        return (ends[0] - ends[1]) / (2 * width)

    def slope(self, row: int | None, vector: ParameterVector) -> Tensor:
        """Return the gradient of the KL, or of one action's log-probability."""
        self.rewind()
        dist = self.policy()
        if row is not None:
            value = log_prob(dist, self.actions)[row]
        elif isinstance(getattr(dist, "base_dist", None), Laplace):
            value = laplace_surrogate(self.old.base_dist, dist.base_dist)
        else:
            value = mean_kl(self.old, dist, self.mask)
        slopes = torch.autograd.grad(value, self.trained, allow_unused=True)
        self.rewind()
        return vector.gather(slopes)


def laplace_surrogate(old: Any, new: Any) -> Tensor:
    """Return a smooth function with a Laplace's Fisher matrix, 1/b² in location and in scale."""
    moved = (new.loc - old.loc).square() + (new.scale - old.scale).square()
    value: Tensor = (moved / (2 * old.scale.square())).sum(1).mean()
    return value
