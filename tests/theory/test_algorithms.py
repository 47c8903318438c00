"""The paper's algorithms on random processes, each against an exact computation."""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from random_processes import MDPS, SEEDS, random_policy

from trpo_optim.theory import (
    TabularMDP,
    conservative_step,
    constrained_step,
    kl_by_state,
    lower_bound,
    max_kl_divergence,
    monotonic_step,
    penalised_step,
    policy_iteration_step,
    random_mdp,
)


@pytest.mark.no_cover
@given(MDPS, SEEDS)
def test_algorithm_1_never_lowers_the_return(mdp: TabularMDP, seed: int) -> None:
    policy = random_policy(mdp, seed)
    new = monotonic_step(mdp, policy)
    bound = lower_bound(mdp, policy, new)
    assert mdp.expected_return(new) >= bound - 1e-10
    assert bound >= mdp.expected_return(policy) - 1e-10


def test_algorithm_1_climbs_step_by_step() -> None:
    mdp = random_mdp(4, 3, 0.5, seed=2)
    policy = random_policy(mdp, 0)
    returns = [mdp.expected_return(policy)]
    for _ in range(20):
        policy = monotonic_step(mdp, policy)
        returns.append(mdp.expected_return(policy))
    assert all(after >= before - 1e-10 for before, after in itertools.pairwise(returns))
    greedy = policy
    for _ in range(10):
        greedy = policy_iteration_step(mdp, greedy)
    best = mdp.expected_return(greedy)
    assert returns[-1] > returns[0] + 1e-3 * (best - returns[0])


@given(MDPS, SEEDS)
def test_conservative_policy_iteration_never_lowers_the_return(mdp: TabularMDP, seed: int) -> None:
    policy = random_policy(mdp, seed)
    for _ in range(3):
        new = conservative_step(mdp, policy)
        assert mdp.expected_return(new) >= mdp.expected_return(policy) - 1e-10
        policy = new


@given(MDPS, SEEDS, st.floats(1e-4, 3.0))
def test_the_constrained_step_is_the_best_of_all_within_the_radius(
    mdp: TabularMDP, seed: int, radius: float
) -> None:
    policy = random_policy(mdp, seed)
    new = constrained_step(mdp, policy, radius)
    assert max_kl_divergence(policy, new) <= radius * (1 + 1e-9) + 1e-12
    best = mdp.surrogate(policy, new)
    worth = mdp.visitation(policy)[:, None] * mdp.advantages(policy)  # of a unit of probability
    for other_seed in range(5):
        other = random_policy(mdp, other_seed, 3.0)
        share = torch.linspace(0, 1, 20, dtype=torch.float64)[:, None, None]
        mixed = (1 - share) * policy + share * other
        within = kl_by_state(policy, mixed).amax(1) <= radius
        gained = (worth * mixed).sum((1, 2))[within]
        assert bool((mdp.expected_return(policy) + gained <= best + 1e-9).all())
    assert best == pytest.approx(mdp.expected_return(policy) + float((worth * new).sum()), abs=1e-9)


@pytest.mark.no_cover
@given(MDPS, SEEDS, st.floats(1e-3, 1.0))
def test_penalty_and_constraint_agree_where_the_price_is_the_slope(
    mdp: TabularMDP, seed: int, radius: float
) -> None:
    policy = random_policy(mdp, seed)
    width = 1e-4 * radius

    def gain(radius: float) -> float:
        return mdp.surrogate(policy, constrained_step(mdp, policy, radius))

    price = (gain(radius + width) - gain(radius - width)) / (2 * width)
    if price < 1e-6:
        return  # one action, or all the same
    penalised = penalised_step(mdp, policy, price)
    worth = mdp.surrogate(policy, penalised) - price * max_kl_divergence(policy, penalised)
    constrained = gain(radius) - price * radius
    assert worth >= constrained - 1e-9
    assert worth == pytest.approx(constrained, abs=1e-6 * price * radius + 1e-9)


@given(MDPS, SEEDS)
def test_without_a_constraint_the_step_is_policy_iteration(mdp: TabularMDP, seed: int) -> None:
    policy = random_policy(mdp, seed)
    greedy = policy_iteration_step(mdp, policy)
    free = constrained_step(mdp, policy, 30.0)
    gap = mdp.advantages(policy).topk(min(2, policy.shape[1]), 1).values
    clear = (gap[:, 0] - gap[:, -1] > 1e-6) | (policy.shape[1] == 1)
    torch.testing.assert_close(free[clear], greedy[clear], rtol=0, atol=1e-6)


def test_policy_iteration_ends_at_the_best_of_all_deterministic_policies() -> None:
    mdp = random_mdp(4, 3, 0.9, seed=1)
    policy = random_policy(mdp, 0)
    for _ in range(10):
        policy = policy_iteration_step(mdp, policy)
    deterministic = itertools.product(range(3), repeat=4)
    best = max(
        mdp.expected_return(torch.nn.functional.one_hot(torch.tensor(each), 3).double())
        for each in deterministic
    )
    assert mdp.expected_return(policy) == pytest.approx(best, abs=1e-12)
