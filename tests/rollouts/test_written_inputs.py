"""Policies and critics may write what they are given: nothing that was collected changes."""

from __future__ import annotations

import copy
from typing import Any

import gymnasium as gym
import pytest
import torch
from small_environments import cartpole, vector
from torch import Tensor, nn
from torch.distributions import Categorical

from trpo_optim import TrustRegionOptimizer
from trpo_optim.rollouts import (
    SinglePathBatch,
    fit_value,
    policy_closure,
    single_path,
    vine,
    vine_closure,
)

WINDOW = 12


class Plain(nn.Module):
    """A policy of scaled observations, and of the entry ``bias`` where there is one."""

    def __init__(self, *, writes: bool) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.network = nn.Linear(4, 2)
        self.writes = writes

    def forward(self, seen: Tensor, bias: Tensor | None = None) -> Categorical:
        if self.writes:
            seen -= 0.1
            seen /= 0.5
            bias = None if bias is None else bias.mul_(2.0)
        else:
            seen = (seen - 0.1) / 0.5
            bias = None if bias is None else 2.0 * bias
        logits = self.network(seen)
        return Categorical(logits=logits if bias is None else logits + bias)


class Window(nn.Module):
    """A policy of the last three observations, which its state holds, (1, N, 12)."""

    def __init__(self, *, writes: bool) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.network = nn.Linear(WINDOW, 2)
        self.writes = writes

    def forward(self, seen: Tensor, state: Tensor, starts: Tensor) -> tuple[Categorical, Tensor]:
        logits = []
        for now, begins in zip(seen, starts, strict=True):
            state = state if self.writes else state.clone()
            state[0, begins] = 0.0
            state[0] = torch.cat([state[0, :, 4:], now], -1)
            logits.append(self.network(state[0].clone()))
        if self.writes:
            starts[:] = True
        return Categorical(logits=torch.stack(logits)), state


class Biased(gym.Wrapper[Any, Any, Any, Any]):
    """An environment whose info has a bias of the logits."""

    def reset(self, **options: Any) -> Any:
        seen, info = self.env.reset(**options)
        return seen, {**info, "bias": seen[:2]}

    def step(self, action: Any) -> Any:
        *rest, info = self.env.step(action)
        return (*rest, {**info, "bias": rest[0][:2]})


def batch_of(policy: nn.Module) -> SinglePathBatch:
    """Return a batch, the second of two: it begins where the state is not zero."""
    torch.manual_seed(0)
    if isinstance(policy, Window):
        envs = vector(cartpole)
        first = single_path(envs, policy, steps=9, state=torch.zeros(1, 3, WINDOW), seed=0)
    else:
        envs = vector(lambda: Biased(cartpole()))
        first = single_path(envs, policy, steps=9, info="bias", seed=0)
    names = "bias" if first.info else ()
    return single_path(envs, policy, steps=40, after=first, info=names)


def tensors_in(batch: SinglePathBatch) -> list[Tensor]:
    """Return what a policy is given of a batch, and what it made of this."""
    state = [] if batch.state is None else [batch.state, batch.end.state]
    assert batch.log_prob is not None
    return [batch.observations, batch.actions, batch.log_prob, *batch.info.values(), *state]


@pytest.mark.parametrize("policy", [Plain, Window])
@pytest.mark.parametrize("options", [{}, {"curvature": 0.5}, {"micro_batch": 2}, {"reuse": True}])
def test_a_policy_that_writes_its_input_learns_as_one_that_does_not(
    policy: type[Plain | Window], options: dict[str, Any]
) -> None:
    found = []
    for writes in (False, True):
        learner = policy(writes=writes)
        batch = batch_of(learner)
        before = copy.deepcopy(tensors_in(batch))
        advantages = torch.randn(40, 3, generator=torch.Generator().manual_seed(1))
        assert batch.log_ratios(learner).abs().max() < 1e-5
        given: Any = (batch, advantages)
        if options.get("reuse"):
            given = ([batch, batch], [advantages, advantages])
        rest = {name: value for name, value in options.items() if name != "reuse"}
        drawn = torch.Generator().manual_seed(2) if "curvature" in rest else None
        closures = policy_closure(learner, *given, generator=drawn, **rest)
        report = TrustRegionOptimizer(learner.parameters()).step(closures)
        assert report.accepted
        assert all(map(torch.equal, before, tensors_in(batch)))
        found.append([*before, *learner.parameters(), batch.log_ratios(learner)])
    for own, other in zip(*found, strict=True):
        torch.testing.assert_close(own, other)


def test_a_vine_of_a_policy_that_writes_its_input() -> None:
    found = []
    for writes in (False, True):
        learner = Plain(writes=writes)
        torch.manual_seed(0)
        envs: Any = vector(cartpole, 2)
        batch = vine(envs, learner, steps=8, states=4, horizon=6, gamma=0.9, seed=0)
        TrustRegionOptimizer(learner.parameters()).step(vine_closure(learner, batch))
        found.append([batch.observations, batch.q, batch.trunk.observations, *learner.parameters()])
    for own, other in zip(*found, strict=True):
        torch.testing.assert_close(own, other)


def test_a_critic_that_writes_its_input() -> None:
    batch = batch_of(Window(writes=False))
    before, rows = batch.observations.clone(), batch.flat(batch.observations)
    torch.manual_seed(0)
    head = nn.Linear(4, 1)

    def critic(seen: Tensor) -> Tensor:
        seen /= 0.5
        values: Tensor = head(seen)
        return values

    expected = head(before / 0.5)[..., 0].detach()
    for _ in range(2):
        torch.testing.assert_close(batch.values(critic)[0], expected)
    optimizer = torch.optim.SGD(head.parameters(), lr=0.0)
    targets = expected[batch.valid]
    for minibatch in (None, 16):
        fit = fit_value(critic, rows, targets, optimizer, epochs=3, minibatch=minibatch)
        assert fit.loss < 1e-10
    assert torch.equal(batch.observations, before)
    assert torch.equal(rows, before[batch.valid])
