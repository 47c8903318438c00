"""A batch whose policy has moved since: a warning, unless it is corrected for."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
from earlier_batches import feedforward_batches
from pendulum_batches import feedforward, pendulum
from test_recurrent_closures import recurrent
from torch import Tensor, nn
from torch.distributions import Independent, Normal

from trpo_optim import TrustRegionOptimizer
from trpo_optim.rollouts import policy_closure, single_path


@pytest.mark.parametrize("made", [feedforward, recurrent])
@pytest.mark.parametrize("options", [{}, {"micro_batch": 100}, {"curvature": 0.5}])
def test_a_second_step_on_a_batch_warns_and_in_a_list_does_not(
    made: Any, options: dict[str, Any]
) -> None:
    policy, batch, advantages = made()
    advantages = advantages.nan_to_num()
    optimizer = TrustRegionOptimizer(policy.parameters(), max_kl=0.02)
    assert optimizer.step(policy_closure(policy, batch, advantages, **options)).accepted
    before = batch.log_prob, policy_closure(policy, [batch], [advantages], **options)
    with pytest.warns(UserWarning, match=r"about 0.0\d+ nats.*policy_closure\(policy, \[batch\]"):
        policy_closure(policy, batch, advantages, **options)
    assert batch.log_prob is before[0]


def test_other_log_probabilities_say_what_drew_the_actions() -> None:
    policy, batch, advantages = feedforward()
    with torch.no_grad():
        policy.log_std.add_(0.5)
    policy_closure(policy, batch, advantages, sampling_log_prob=batch.log_prob)
    with pytest.warns(UserWarning, match="not the one that drew"):
        policy_closure(policy, batch, advantages)


class Dropping(nn.Module):
    """A policy that draws another mask with every call."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.network = nn.Sequential(nn.Linear(3, 32), nn.Dropout(0.5), nn.Linear(32, 1))

    def forward(self, seen: Tensor) -> Independent:  # type: ignore[type-arg]
        return Independent(Normal(3.0 * self.network(seen), 1.0), 1)


def test_dropout_is_no_move() -> None:
    policy = Dropping()
    batch = single_path(pendulum(), policy, steps=50, seed=0)
    assert float(batch.log_ratios(policy).abs().mean()) > 0.1
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        policy_closure(policy, batch, torch.randn(batch.rewards.shape))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_rounding_is_no_move(dtype: torch.dtype) -> None:
    policy, *_ = feedforward_batches("cpu")
    network = policy.network.to(dtype)

    def act(seen: Tensor) -> Any:
        return Independent(Normal(network(seen.to(dtype)).float(), policy.log_std.exp()), 1)

    batch = single_path(pendulum(), act, steps=300, seed=0)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        policy_closure(act, batch, torch.randn(batch.rewards.shape))
