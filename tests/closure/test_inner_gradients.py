"""A closure may differentiate inside itself, in the trials too."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from problems import MODES, Problem, gaussian
from torch import Tensor, nn
from torch.distributions import Categorical, Distribution


class Force(nn.Module):
    """A policy whose logits are the slope of a learned energy."""

    def __init__(self, *, by_transform: bool = False) -> None:
        super().__init__()
        self.energy = nn.Sequential(nn.Linear(3, 6), nn.Tanh(), nn.Linear(6, 1)).double()
        self.by_transform = by_transform

    def forward(self, x: Tensor) -> Distribution:
        if self.by_transform:
            force = torch.func.vmap(torch.func.grad(lambda row: self.energy(row).sum()))(x)
        else:
            place = x.detach().requires_grad_()
            with torch.enable_grad():
                energy = self.energy(place).sum()
            keep = torch.is_grad_enabled()
            (force,) = torch.autograd.grad(energy, place, create_graph=keep)
        return Categorical(logits=-force)


class PlainForce(Force):
    """The same, as one writes it without a thought of where gradients are off."""

    def forward(self, x: Tensor) -> Distribution:
        place = x.detach().requires_grad_()
        (force,) = torch.autograd.grad(self.energy(place).sum(), place, create_graph=True)
        return Categorical(logits=-force)


@pytest.mark.parametrize("mode", MODES)
def test_a_policy_that_is_the_gradient_of_an_energy_takes_the_step_of_one_that_guards_it(
    mode: str,
) -> None:
    vectors = []
    for kind in (Force, PlainForce):
        torch.manual_seed(0)
        policy = kind()
        guarded = Force()
        guarded.load_state_dict(policy.state_dict())
        problem = Problem(guarded, torch.randn(20, 3, dtype=torch.float64))
        problem.policy = policy
        report = problem.optimizer(mode=mode).step(problem.closure)
        assert report.accepted
        vectors.append(problem.vector())
    torch.testing.assert_close(vectors[1], vectors[0], rtol=1e-9, atol=1e-12)


def test_an_inner_step_of_gradient_descent_is_followed_in_the_trials() -> None:
    """MAML-TRPO: the loss is that of the policy after a step on an inner loss."""
    problem = gaussian()
    policy = problem.policy

    def closure() -> Any:
        loss, kl = problem.closure()
        slopes = torch.autograd.grad(loss, list(policy.parameters()), create_graph=True)
        named = zip(policy.named_parameters(), slopes, strict=True)
        adapted = {name: each - 0.1 * slope for (name, each), slope in named}
        dist = torch.func.functional_call(policy, adapted, (problem.observations,))
        return problem.values(dist)[0], kl

    report = problem.optimizer().step(closure)
    assert report.accepted
    assert report.improvement == pytest.approx(report.predicted_improvement, rel=0.5)


def test_a_gradient_that_is_taken_in_the_trials_alone_is_taken_there() -> None:
    problem, plain = gaussian(), gaussian()
    calls: list[int] = []
    taken = []

    def closure() -> Any:
        calls.append(1)
        loss, kl = problem.closure()
        if len(calls) > 1:
            taken.append(torch.autograd.grad(kl, problem.parameters(), create_graph=True))
        return loss, kl

    report = problem.proven_optimizer().step(closure)
    assert report.accepted
    assert taken
    plain.optimizer().step(plain.closure)
    torch.testing.assert_close(problem.vector(), plain.vector(), rtol=1e-12, atol=0)


def test_another_error_in_a_trial_is_not_asked_twice() -> None:
    problem = gaussian()
    calls = []

    def closure() -> Any:
        calls.append(1)
        if not torch.is_grad_enabled():
            raise RuntimeError("a reader of the batch failed")
        return problem.closure()

    with pytest.raises(RuntimeError, match="reader"):
        problem.proven_optimizer().step(closure)
    assert len(calls) == 2
