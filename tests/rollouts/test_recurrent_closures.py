"""Closures of recurrent policies and of data of an earlier policy."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from pendulum_batches import feedforward, pendulum, vector_of
from torch import Tensor, nn
from torch.distributions import Distribution, Independent, Normal

from trpo_optim import (
    TrustRegionOptimizer,
)
from trpo_optim.rollouts import (
    SinglePathBatch,
    policy_closure,
    single_path,
    trajectory_weights,
)

pytestmark = pytest.mark.no_cover


class Recurrent(nn.Module):
    """A GRU whose state is put to zero where an episode starts."""

    def __init__(self) -> None:
        super().__init__()
        self.gru = nn.GRU(3, 8)
        self.head = nn.Linear(8, 1)

    def forward(self, seen: Tensor, state: Any, starts: Tensor) -> tuple[Distribution, Any]:
        outputs = []
        for now, begins in zip(seen, starts, strict=True):
            kept = state[0] * ~begins[None, :, None]
            output, after = self.gru(now[None], kept)
            state = (after,)
            outputs.append(output[0])
        mean = self.head(torch.stack(outputs))
        return Independent(Normal(mean, torch.ones(1)), 1), state


def recurrent() -> tuple[Recurrent, SinglePathBatch, Tensor]:
    torch.manual_seed(0)
    policy = Recurrent()
    start = (torch.zeros(1, 4, 8),)
    envs = pendulum()
    first = single_path(envs, policy, steps=20, state=start, seed=0)
    batch = single_path(envs, policy, steps=20, after=first)
    return policy, batch, torch.randn(20, 4).masked_fill(~batch.valid, math.nan)


def test_a_recurrent_policy_is_evaluated_as_it_acted() -> None:
    torch.manual_seed(0)
    policy = Recurrent()
    logs = []

    def acting(seen: Tensor, state: Any, starts: Tensor) -> Any:
        dist, state = policy(seen, state, starts)
        logs.append(dist)
        return dist, state

    start = (torch.zeros(1, 4, 8),)
    envs = pendulum()
    first = single_path(envs, acting, steps=20, state=start, seed=0)
    logs.clear()
    batch = single_path(envs, acting, steps=30, after=first)
    acted = torch.stack(
        [dist.log_prob(each[None])[0] for dist, each in zip(logs, batch.actions, strict=True)]
    )
    advantages = torch.ones(30, 4)
    (closure,) = policy_closure(policy, batch, advantages, sampling_log_prob=acted).parts
    loss, kl, _ = closure()  # type: ignore[misc]  # with a distribution
    assert float(loss.detach()) == pytest.approx(-1.0, abs=1e-5)  # every ratio is one
    assert kl.shape == (int(batch.valid.sum()),)


@pytest.mark.slow
def test_a_recurrent_policys_step_is_the_same_in_parts_of_environments() -> None:
    found = []
    for micro_batch in (None, 1, 3):
        policy, batch, advantages = recurrent()
        built = policy_closure(policy, batch, advantages, micro_batch=micro_batch)
        assert len(built.parts) == {None: 1, 1: 4, 3: 2}[micro_batch]
        report = TrustRegionOptimizer(policy.parameters(), cg_iterations=3).step(built)
        assert report.accepted
        found.append(vector_of(policy))
    torch.testing.assert_close(found[0], found[1], rtol=1e-3, atol=1e-5)
    torch.testing.assert_close(found[0], found[2], rtol=1e-3, atol=1e-5)
    policy, batch, advantages = recurrent()
    built = policy_closure(policy, batch, advantages, curvature=0.5)
    assert TrustRegionOptimizer(policy.parameters()).step(built).accepted


def test_data_of_an_earlier_policy_counts_by_its_weights() -> None:
    policy, batch, advantages = feedforward()
    with torch.no_grad():
        behaviour = policy(batch.observations).log_prob(batch.actions)
        for parameter in policy.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
        present = policy(batch.observations).log_prob(batch.actions)
    weights = trajectory_weights(present - behaviour, batch.starts, largest=5.0)
    built = policy_closure(policy, batch, advantages, weights=weights, sampling_log_prob=behaviour)
    loss = built()[0]
    expected = (weights * (present - behaviour).exp() * advantages)[batch.valid].mean()
    assert float(loss.detach()) == pytest.approx(-float(expected), rel=1e-4)
    assert TrustRegionOptimizer(policy.parameters()).step(built).accepted


@pytest.mark.parametrize("wrapped", [False, True])
def test_the_entropy_bonus_sums_over_the_dimensions_of_an_action(wrapped: bool) -> None:
    _, batch, _ = recurrent()
    batch = replace(batch, actions=batch.actions.repeat(1, 1, 3), log_prob=None)
    log_std = nn.Parameter(torch.zeros(3))

    def policy(seen: Tensor, state: Any, starts: Tensor) -> Any:
        dist = Normal(torch.zeros(*seen.shape[:2], 3), log_std.exp())
        return Independent(dist, 1) if wrapped else dist, state

    advantages = torch.zeros(batch.valid.shape)
    loss = policy_closure(policy, batch, advantages, entropy_bonus=1.0)()[0]
    assert float(loss.detach()) == pytest.approx(-3 * 0.5 * math.log(2 * math.pi * math.e))
    (slope,) = torch.autograd.grad(loss, log_std)
    torch.testing.assert_close(slope, torch.full((3,), -1.0))
