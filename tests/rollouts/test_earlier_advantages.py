"""Advantages of the present policy from trajectories of an earlier one, by exact enumeration."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from enumerated import (
    GAMMA,
    STATES,
    STEPS,
    Enumeration,
    by_logits,
    enumeration,
    exact_gradient,
    layered,
    random_logits,
)
from test_returns import ENDS, GOOD, Rows
from torch import Tensor

from trpo_optim import TrustRegionError
from trpo_optim.rollouts import gae, policy_closure, trajectory_weights
from trpo_optim.theory import TabularMDP

MDP, PRESENT, BEHAVIOUR = layered(0), random_logits(1), random_logits(2)
CRITIC = torch.randn(STATES + 1, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
"""A critic that is wrong everywhere."""


def advantages_of(every: Enumeration, **options: Any) -> Tensor:
    values, following = every.batch.values(lambda states: CRITIC[states])
    batch = every.batch
    return gae(batch.rewards, values, following, batch.ends, gamma=GAMMA, **options)


def surrogate_gradient(every: Enumeration, advantages: Tensor, ratios: Tensor) -> Tensor:
    """The expected gradient of the objective that a step would improve."""
    logits = PRESENT.clone().requires_grad_()
    weights = every.weights() * trajectory_weights(ratios, every.batch.starts)
    built = policy_closure(by_logits(logits), [every.batch], [advantages], weights=[weights])
    (gradient,) = torch.autograd.grad(built()[0], logits)
    return -gradient


def expected_by_table(mdp: TabularMDP, trace: float, largest: float) -> Tensor:
    """E[A | s, a] of an estimate with a wrong critic, by dynamic programming, (S, A)."""
    behaviour, present = BEHAVIOUR.softmax(1), PRESENT.softmax(1)
    critic = CRITIC.clone()
    critic[STATES] = 0.0
    cut = behaviour * (present / behaviour).clamp(max=largest)
    deltas = mdp.rewards + GAMMA * mdp.transitions @ critic - critic[:, None]
    result = deltas
    for _ in range(STEPS):
        result = deltas + GAMMA * trace * mdp.transitions @ (cut * result).sum(1)
    result[STATES] = 0.0
    return result


def test_all_trajectories_are_there() -> None:
    every = enumeration(MDP, BEHAVIOUR)
    assert float(every.shares.sum()) == pytest.approx(1, abs=1e-12)
    returns = (every.batch.rewards * GAMMA ** torch.arange(STEPS).double()[:, None]).sum(0)
    expected = MDP.expected_return(BEHAVIOUR.softmax(1))
    assert float(every.shares @ returns) == pytest.approx(expected, abs=1e-12)


def test_without_a_cut_an_earlier_policys_trajectories_give_the_present_gradient() -> None:
    every = enumeration(MDP, BEHAVIOUR)
    ratios = every.batch.log_ratios(by_logits(PRESENT))
    advantages = advantages_of(every, gae_lambda=1.0, log_ratios=ratios, largest=math.inf)
    found, exact = surrogate_gradient(every, advantages, ratios), exact_gradient(MDP, PRESENT)
    torch.testing.assert_close(found, exact, rtol=0, atol=1e-9)
    plain = surrogate_gradient(every, advantages_of(every, gae_lambda=1.0), ratios)
    assert float((plain - exact).norm()) > 0.1 * float(exact.norm())  # the ratios are needed


@pytest.mark.parametrize("trace", [0.0, 0.7, 1.0])
@pytest.mark.parametrize("largest", [0.5, 1.0, 2.0, math.inf])
def test_a_cut_has_the_bias_of_the_exact_expectation(trace: float, largest: float) -> None:
    every = enumeration(MDP, BEHAVIOUR)
    ratios = every.batch.log_ratios(by_logits(PRESENT))
    advantages = advantages_of(every, gae_lambda=trace, log_ratios=ratios, largest=largest)
    table = expected_by_table(MDP, trace, largest)
    rows = every.batch.observations * 2 + every.batch.actions
    shares = every.shares.expand_as(advantages)
    sums, weights = torch.zeros(2, 2 * STATES + 2, dtype=torch.float64)
    sums.index_add_(0, rows.reshape(-1), (shares * advantages).reshape(-1))
    weights.index_add_(0, rows.reshape(-1), shares.reshape(-1))
    found = (sums / weights)[: 2 * STATES].reshape(STATES, 2)
    torch.testing.assert_close(found, table[:STATES], rtol=0, atol=1e-12)
    logits = PRESENT.clone().requires_grad_()
    visits = MDP.visitation(PRESENT.softmax(1))[:, None]
    (gradient,) = torch.autograd.grad((visits * logits.softmax(1) * table).sum(), logits)
    of_surrogate = surrogate_gradient(every, advantages, ratios)
    torch.testing.assert_close(of_surrogate, gradient, rtol=0, atol=1e-12)
    bias = float((gradient - exact_gradient(MDP, PRESENT)).norm())
    assert (bias < 1e-9) == (trace == 1.0 and largest == math.inf)


@pytest.mark.parametrize("largest", [0.8, 1.0, 3.0])
def test_the_estimates_are_those_of_v_trace(largest: float) -> None:
    """They are r + γv′ − V, and v is V + min(ρ) A, with v written out as the definition has it."""
    rows = Rows(0)
    ratios = torch.randn(rows.rewards.shape, generator=torch.Generator().manual_seed(1)).double()
    cut = ratios.exp().clamp(max=largest)
    deltas = cut * (rows.rewards + 0.9 * rows.next_values - rows.values)
    targets = rows.values.clone()
    for env in range(targets.shape[1]):
        for step in range(len(targets)):
            product = 1.0
            for age, row in enumerate(rows.trajectory(step, env)):
                targets[step, env] += 0.9**age * product * deltas[row, env]
                product *= float(cut[row, env])
    found = gae(
        rows.rewards,
        rows.values,
        rows.next_values,
        rows.ends,
        gamma=0.9,
        gae_lambda=1.0,
        log_ratios=ratios,
        largest=largest,
    )
    torch.testing.assert_close(rows.values + cut * found, targets)
    following = torch.where(rows.ends, rows.next_values, torch.cat([targets[1:], targets[:1]]))
    following[-1] = rows.next_values[-1]
    torch.testing.assert_close(found, rows.rewards + 0.9 * following - rows.values)


def test_of_the_present_policy_the_estimates_are_as_without_ratios() -> None:
    rows = Rows(0)
    given = (rows.rewards, rows.values, rows.next_values, rows.ends)
    plain = gae(*given, gamma=0.9, gae_lambda=0.8)
    same = gae(*given, gamma=0.9, gae_lambda=0.8, log_ratios=torch.zeros_like(plain))
    assert torch.equal(plain, same)


def test_nothing_from_beyond_an_end_reaches_what_came_before() -> None:
    rows = Rows(0)
    rows.ends[:] = False
    rows.ends[5] = True
    ratios = torch.zeros_like(rows.rewards)
    rows.rewards[6:], ratios[6:] = math.nan, math.nan
    found = gae(
        rows.rewards,
        rows.values,
        rows.next_values,
        rows.ends,
        gamma=0.9,
        gae_lambda=0.9,
        log_ratios=ratios,
    )
    assert found[:6].isfinite().all()


@pytest.mark.parametrize("steps", [1, 2, 3, 8, 100, 513])
def test_estimates_of_any_length_are_those_of_the_recursion(steps: int) -> None:
    noise = torch.Generator().manual_seed(steps)
    rewards, values, following, ratios = torch.randn(
        4, steps, 3, generator=noise, dtype=torch.float64
    )
    ends = torch.rand(steps, 3, generator=noise) < 0.02
    found = gae(
        *(rewards, values, following, ends),
        gamma=0.99,
        gae_lambda=0.95,
        log_ratios=0.1 * ratios,
        largest=math.inf,
    )
    after = torch.zeros(3, dtype=torch.float64)
    for step in reversed(range(steps)):
        after = after.masked_fill(ends[step], 0.0)
        delta = rewards[step] + 0.99 * following[step] - values[step]
        estimate = delta + 0.99 * 0.95 * after
        torch.testing.assert_close(found[step], estimate, rtol=1e-11, atol=1e-11)
        after = (0.1 * ratios[step]).exp() * estimate


def test_the_product_of_large_ratios_may_exceed_the_largest_number() -> None:
    rows = torch.zeros(9, 1)
    rewards = rows.clone()
    rewards[3] = 1.0
    found = gae(
        *(rewards, rows, rows, rows.bool()),
        gamma=1.0,
        gae_lambda=1.0,
        log_ratios=torch.full((9, 1), 40.0),
        largest=math.inf,
    )
    assert found[4:].eq(0).all()
    torch.testing.assert_close(found[1:4, 0].log(), torch.tensor([80.0, 40.0, 0.0]))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"log_ratios": GOOD[:3]}, r"shapes differ.*'log_ratios': \(3, 2\)"),
        ({"log_ratios": GOOD.long()}, "log_ratios is torch.int64; it must be floating point"),
        ({"log_ratios": GOOD, "largest": 0.0}, "largest is 0.0; it must be above 0"),
        ({"log_ratios": GOOD, "largest": math.nan}, "largest is nan; it must be above 0"),
    ],
)
def test_what_makes_no_sense_is_refused_by_name(options: dict[str, Any], message: str) -> None:
    with pytest.raises(TrustRegionError, match=message):
        gae(GOOD, GOOD, GOOD, ENDS, gamma=0.9, gae_lambda=0.9, **options)


@pytest.mark.parametrize(
    "logs", [[0.0, 70, 70, -90, 0], [0.0, -60, -60, 80, 0], [0.0, 80, -80, 80, -80]]
)
def test_ratios_whose_products_are_beyond_single_precision_on_the_way(logs: list[float]) -> None:
    rewards, nothing = torch.tensor([[0.0, 0, 0, 1, 0]]).T, torch.zeros(5, 1)
    ends = torch.tensor([[False] * 4 + [True]]).T
    found = gae(
        rewards,
        nothing,
        nothing,
        ends,
        gamma=1.0,
        gae_lambda=1.0,
        log_ratios=torch.tensor([logs]).T,
        largest=math.inf,
    )
    assert found.dtype is torch.float32
    assert float(found[0]) == pytest.approx(math.exp(sum(logs[1:4])), rel=1e-5)
