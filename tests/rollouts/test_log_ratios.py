"""Ratios of the present policy's densities to those of what drew the actions of a batch."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from pendulum_batches import feedforward, pendulum
from small_environments import cartpole, coin, vector
from test_recurrent_closures import Recurrent
from torch.distributions import Independent, Normal

from trpo_optim import TrustRegionError
from trpo_optim.rollouts import single_path


def test_ratios_are_those_of_the_densities_and_zero_where_no_row_is() -> None:
    policy, batch, _ = feedforward()
    assert not batch.valid.all()
    with torch.no_grad():
        policy.log_std.add_(0.3)
        next(policy.network[2].parameters()).add_(0.2)
    before = torch.get_rng_state()
    found = batch.log_ratios(policy)
    assert torch.equal(torch.get_rng_state(), before)
    with torch.no_grad():
        expected = policy(batch.observations).log_prob(batch.actions) - batch.log_prob
    torch.testing.assert_close(found, expected.masked_fill(~batch.valid, 0.0))
    assert float(found.abs().max()) > 0.1


def test_ratios_of_a_recurrent_policy_run_through_its_state() -> None:
    torch.manual_seed(0)
    policy, envs = Recurrent(), pendulum()
    first = single_path(envs, policy, steps=20, state=(torch.zeros(1, 4, 8),), seed=0)
    batch = single_path(envs, policy, steps=20, after=first)
    assert float(batch.log_ratios(policy).abs().max()) < 1e-5
    with torch.no_grad():
        policy.head.bias.add_(1.0)
        mean = policy(batch.observations, batch.state, batch.starts)[0].mean[..., 0]
    expected = (batch.actions[..., 0] - mean + 0.5).masked_fill(~batch.valid, 0.0)
    torch.testing.assert_close(batch.log_ratios(policy), expected, rtol=1e-4, atol=1e-5)


def test_ratios_leave_dropout_masks_to_the_step() -> None:
    policy, batch, _ = feedforward()
    policy.network.insert(1, torch.nn.Dropout(0.5))
    before = torch.get_rng_state()
    batch.log_ratios(policy)
    assert torch.equal(torch.get_rng_state(), before)


def test_a_policy_of_another_shape_is_refused() -> None:
    batch = single_path(vector(cartpole), coin, steps=5, seed=0)
    with pytest.raises(TrustRegionError, match=r"have shape \(\) and there are 15 rows"):
        batch.log_ratios(lambda seen: Independent(coin(seen), 1))
    pendulums = feedforward()[1]
    with pytest.raises(TrustRegionError, match=r"Independent\(dist, 1\)"):
        pendulums.log_ratios(lambda seen: Normal(seen[:, :1], 1.0))


def test_a_batch_without_valid_rows_has_ratios_of_one() -> None:
    policy, batch, _ = feedforward()
    empty = replace(batch, valid=torch.zeros_like(batch.valid))
    assert torch.equal(empty.log_ratios(policy), torch.zeros_like(batch.rewards))
