"""Torch's switches are held by a step, and afterwards are what they were."""

from __future__ import annotations

import math
import threading
from typing import Any

import pytest
import torch
from problems import MODES, gaussian, switches
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from trpo_optim import Outcome, TrustRegionOptimizer, frozen, log_prob, mean_kl


def test_overlapping_steps_leave_the_switches_as_they_were() -> None:
    """The first to come is the first to leave, while the other is still inside."""
    before = switches()
    first_inside, second_inside, first_done = (threading.Event() for _ in range(3))
    seen: list[Any] = []

    def first() -> None:
        problem = gaussian()

        def closure() -> Any:
            first_inside.set()
            assert second_inside.wait(10)
            return problem.closure()

        problem.optimizer().step(closure)
        first_done.set()

    def second() -> None:
        problem = gaussian()
        assert first_inside.wait(10)

        def closure() -> Any:
            second_inside.set()
            assert first_done.wait(10)
            seen.append(switches())
            return problem.closure()

        problem.optimizer().step(closure)

    threads = [threading.Thread(target=each) for each in (first, second)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert switches() == before
    assert len(seen) > 1
    assert all(each[0] is False for each in seen)  # flash attention is off until the last has left


@pytest.mark.parametrize("mode", MODES)
def test_anomaly_mode_changes_no_outcome(mode: str) -> None:
    problem = gaussian()
    weight = problem.parameters()[0]

    def closure() -> Any:
        loss, kl = problem.closure()
        return loss + (0 * weight).norm() * math.inf + (weight - weight.detach()).norm(), kl

    outcomes = []
    for anomaly in (False, True):
        with torch.autograd.set_detect_anomaly(anomaly):
            outcomes.append(problem.optimizer(mode=mode).step(closure).outcome)
            assert torch.is_anomaly_enabled() is anomaly
    assert outcomes[0] is outcomes[1]
    assert outcomes[0] in (Outcome.NON_FINITE_LOSS, Outcome.NON_FINITE_GRADIENT)


def test_a_gradient_that_is_not_a_number_is_an_outcome_in_anomaly_mode() -> None:
    problem = gaussian()
    weight = problem.parameters()[0]

    def closure() -> Any:
        loss, kl = problem.closure()
        return loss + (weight - weight.detach()).sqrt().sum(), kl

    with torch.autograd.set_detect_anomaly(True):
        report = problem.optimizer().step(closure)
    assert report.outcome is Outcome.NON_FINITE_GRADIENT


class Attended(nn.Module):
    """Attention in a checkpoint, whose kernel is chosen again when it is computed anew."""

    def __init__(self, *, reentrant: bool) -> None:
        super().__init__()
        self.lift = nn.Linear(3, 8)
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)
        self.head = nn.Linear(8, 4)
        self.reentrant = reentrant

    def forward(self, x: Tensor) -> Any:
        hidden = self.lift(x)
        mixed = checkpoint(self._attend, hidden, use_reentrant=self.reentrant)
        return torch.distributions.Categorical(logits=self.head(mixed[:, 0]))

    def _attend(self, x: Tensor) -> Tensor:
        mixed: Tensor = self.attention(x, x, x, need_weights=False)[0]
        return x + mixed


@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad")
@pytest.mark.parametrize("third", [False, True])
@pytest.mark.parametrize(
    ("reentrant", "engine", "engines"),
    [
        (False, "auto", {"finite differences"}),
        (False, "double backward", {"double backward"}),
        (True, "auto", {"finite differences"}),
    ],
)
def test_attention_in_a_checkpoint_is_differentiated(
    reentrant: bool, engine: Any, engines: set[str], third: bool
) -> None:
    torch.manual_seed(0)
    policy, observations = Attended(reentrant=reentrant), torch.randn(20, 5, 3)
    with torch.no_grad():
        old = frozen(policy(observations))
        actions = old.sample()
    old_log_prob, advantages = log_prob(old, actions), torch.randn(20)

    def closure() -> Any:
        dist = policy(observations)
        ratio = (log_prob(dist, actions) - old_log_prob).exp()
        values = -(ratio * advantages).mean(), mean_kl(old, dist)
        return (*values, dist) if third else values

    report = TrustRegionOptimizer(policy.parameters(), engine=engine).step(closure)
    assert report.accepted
    assert report.engine in engines
    assert 0.008 < report.kl <= 0.01
