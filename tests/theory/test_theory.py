"""The paper's statements on random processes, each against an exact computation."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from random_processes import MDPS, SEEDS, random_policy
from torch import Tensor

from trpo_optim import Outcome, StepReport, TrustRegionError
from trpo_optim.theory import (
    TabularMDP,
    conservative_lower_bound,
    constrained_step,
    improvement_bound,
    kl_by_state,
    lower_bound,
    max_kl_divergence,
    max_total_variation,
    mean_kl_divergence,
    monotonic_step,
    penalised_step,
    penalty_coefficient,
    random_mdp,
    state_distribution_bound,
)

SHARPNESS = st.floats(0.0, 4.0)


def epsilon(mdp: TabularMDP, policy: Tensor) -> float:
    return float(mdp.advantages(policy).abs().max())


@given(MDPS, SEEDS, SEEDS, SHARPNESS)
def test_the_return_is_the_old_one_and_the_advantages_on_the_way(
    mdp: TabularMDP, first: int, second: int, sharpness: float
) -> None:
    old, new = random_policy(mdp, first, sharpness), random_policy(mdp, second, sharpness)
    assert mdp.return_by_advantages(old, new) == pytest.approx(mdp.expected_return(new), abs=1e-10)


@given(MDPS, SEEDS, SEEDS, SHARPNESS)
def test_the_return_does_not_fall_below_the_bound(
    mdp: TabularMDP, first: int, second: int, sharpness: float
) -> None:
    old, new = random_policy(mdp, first), random_policy(mdp, second, sharpness)
    value, coefficient = (
        mdp.expected_return(new),
        penalty_coefficient(epsilon(mdp, old), mdp.gamma),
    )
    in_variation = mdp.surrogate(old, new) - coefficient * max_total_variation(old, new) ** 2
    assert value >= in_variation - 1e-10
    assert value >= lower_bound(mdp, old, new) - 1e-10
    assert lower_bound(mdp, old, old) == pytest.approx(mdp.expected_return(old), abs=1e-10)


@given(MDPS, SEEDS, SEEDS, st.floats(0.0, 1.0))
def test_a_mixture_does_not_fall_below_the_conservative_bound(
    mdp: TabularMDP, first: int, second: int, share: float
) -> None:
    old, other = random_policy(mdp, first), random_policy(mdp, second, 4.0)
    mixed = (1 - share) * old + share * other
    bound = conservative_lower_bound(mdp, old, other, share)
    assert mdp.expected_return(mixed) >= bound - 1e-10


@given(MDPS, SEEDS, SEEDS)
def test_return_and_surrogate_have_one_gradient(mdp: TabularMDP, seed: int, way: int) -> None:
    """By central differences along a random direction."""
    old = random_policy(mdp, seed)
    direction = random_policy(mdp, way) - old
    width = 1e-5
    there, back = old + width * direction, old - width * direction
    of_return = (mdp.expected_return(there) - mdp.expected_return(back)) / (2 * width)
    of_surrogate = (mdp.surrogate(old, there) - mdp.surrogate(old, back)) / (2 * width)
    assert of_return == pytest.approx(of_surrogate, rel=1e-5, abs=1e-6)


@given(MDPS, SEEDS, SEEDS, SHARPNESS)
def test_total_variation_is_below_the_root_of_half_the_kl(
    mdp: TabularMDP, first: int, second: int, sharpness: float
) -> None:
    old, new = random_policy(mdp, first), random_policy(mdp, second, sharpness)
    variation = max_total_variation(old, new)
    # Pinsker; the paper needs half of it
    assert 2 * variation**2 <= max_kl_divergence(old, new) + 1e-12
    assert mean_kl_divergence(mdp, old, new) + 1e-12 >= 0
    assert mean_kl_divergence(mdp, old, new) <= max_kl_divergence(old, new) + 1e-12


@given(MDPS, SEEDS, SEEDS, SHARPNESS, st.integers(0, 20))
def test_state_distributions_part_no_faster_than_the_bound(
    mdp: TabularMDP, first: int, second: int, sharpness: float, time: int
) -> None:
    old, new = random_policy(mdp, first), random_policy(mdp, second, sharpness)
    apart = mdp.state_distribution(old, time) - mdp.state_distribution(new, time)
    bound = state_distribution_bound(time, max_kl_divergence(old, new))
    assert float(apart.abs().sum()) <= bound + 1e-12


def test_values_and_visitation_equal_those_of_a_long_rollout() -> None:
    mdp = random_mdp(5, 3, 0.8, seed=3)
    policy = random_policy(mdp, 4)
    chain = torch.einsum("sa,sat->st", policy, mdp.transitions)
    here, weight = mdp.start.clone(), 1.0
    total, visits = 0.0, torch.zeros(5).double()
    for _ in range(300):
        total += weight * float(here @ (policy * mdp.rewards).sum(1))
        visits += weight * here
        here, weight = here @ chain, weight * mdp.gamma
    assert mdp.expected_return(policy) == pytest.approx(total, abs=1e-12)
    torch.testing.assert_close(mdp.visitation(policy), visits)
    assert float(mdp.visitation(policy).sum()) == pytest.approx(5.0)
    torch.testing.assert_close(
        (policy * mdp.advantages(policy)).sum(1), torch.zeros(5).double(), rtol=0, atol=1e-12
    )


def test_the_bound_of_a_practical_step_is_its_improvement_less_the_penalty() -> None:
    report = StepReport(Outcome.ACCEPTED, improvement=0.05, kl=0.01)
    assert penalty_coefficient(2.0, 0.5) == 16.0
    assert improvement_bound(report, advantage=2.0, gamma=0.5) == pytest.approx(0.1 - 0.16)
    report = replace(report, largest_kl=0.02)
    assert improvement_bound(report, advantage=2.0, gamma=0.5) == pytest.approx(0.1 - 0.32)
    assert kl_by_state(torch.eye(2), torch.full((2, 2), 0.5)).tolist() == pytest.approx(
        [math.log(2)] * 2
    )


GOOD = random_mdp(2, 3, 0.9, seed=0)
UNIFORM = torch.full((2, 3), 1 / 3)
REFUSED: dict[str, tuple[Callable[[], object], str]] = {
    "rewards without actions": (
        lambda: TabularMDP(GOOD.transitions, GOOD.rewards[:, 0], GOOD.start, 0.9),
        r"rewards has shape \(2,\)",
    ),
    "transitions of another shape": (
        lambda: TabularMDP(GOOD.transitions[:, :2], GOOD.rewards, GOOD.start, 0.9),
        r"transitions has shape \(2, 2, 2\); with rewards of \(2, 3\) it must be \(2, 3, 2\)",
    ),
    "a start that sums to two": (
        lambda: TabularMDP(GOOD.transitions, GOOD.rewards, 2 * GOOD.start, 0.9),
        "start holds no probabilities.*sum to 1",
    ),
    "NaN rewards": (
        lambda: TabularMDP(GOOD.transitions, GOOD.rewards * math.nan, GOOD.start, 0.9),
        "rewards holds NaN",
    ),
    "a discount factor of one": (
        lambda: TabularMDP(GOOD.transitions, GOOD.rewards, GOOD.start, 1.0),
        r"gamma is 1\.0; it must be in \[0, 1\)",
    ),
    "a policy in NumPy": (
        lambda: GOOD.state_values(UNIFORM.numpy()),  # type: ignore[arg-type]
        "policy is a ndarray.*as_tensor",
    ),
    "a policy of another shape": (lambda: GOOD.state_values(UNIFORM.T), r"shape \(3, 2\)"),
    "a policy that is none": (lambda: GOOD.visitation(-UNIFORM), "policy holds no probabilities"),
    "a new policy that is none": (
        lambda: lower_bound(GOOD, UNIFORM, UNIFORM * math.nan),
        "policy holds no probabilities",
    ),
    "a KL of twice a policy": (
        lambda: max_kl_divergence(2 * UNIFORM, UNIFORM),
        "The old policy holds no probabilities.*from 2 to 2",
    ),
    "a KL by state of twice a policy": (
        lambda: kl_by_state(UNIFORM, 2 * UNIFORM),
        "The new policy holds no probabilities.*from 2 to 2",
    ),
    "policies of other actions": (
        lambda: kl_by_state(UNIFORM, UNIFORM[:, :1] * 3),
        r"shapes \(2, 3\) and \(2, 1\).*of actions",
    ),
    "policies of other states that do not broadcast": (
        lambda: kl_by_state(UNIFORM.expand(4, 3, 2, 3), torch.full((2, 2, 3), 1 / 3)),
        r"shapes \(4, 3, 2, 3\) and \(2, 2, 3\).*must broadcast.*Pass two",
    ),
    "policies without states": (
        lambda: kl_by_state(UNIFORM[:0], UNIFORM[:0]),
        r"The old policy has shape \(0, 3\); .* at least one state.*Pass",
    ),
    "policies without actions": (
        lambda: max_kl_divergence(UNIFORM[:, :0], UNIFORM[:, :0]),
        r"The old policy has shape \(2, 0\)",
    ),
    "a new policy without states": (
        lambda: kl_by_state(UNIFORM[:1], UNIFORM[:0]),
        r"The new policy has shape \(0, 3\)",
    ),
    "a policy that is one number": (
        lambda: kl_by_state(torch.tensor(1.0), torch.tensor(1.0)),
        r"The old policy has shape \(\)",
    ),
    "a time before the start": (lambda: GOOD.state_distribution(UNIFORM, -1), "time is -1"),
    "policies of other states": (
        lambda: max_total_variation(UNIFORM, UNIFORM[:1]),
        r"shapes \(2, 3\) and \(1, 3\)",
    ),
    "a process without states": (
        lambda: TabularMDP(torch.zeros(0, 3, 0), torch.zeros(0, 3), torch.zeros(0), 0.9),
        "at least one of each",
    ),
    "a negative KL": (lambda: state_distribution_bound(2, -0.1), "largest_kl is -0.1"),
    "a negative radius": (lambda: constrained_step(GOOD, UNIFORM, -1.0), "radius is -1.0"),
    "a negative price": (lambda: penalised_step(GOOD, UNIFORM, -1.0), "coefficient is -1.0"),
    "a deterministic policy": (
        lambda: monotonic_step(GOOD, torch.eye(3)[:2].double()),
        "rules out an action",
    ),
    "a share above one": (
        lambda: conservative_lower_bound(GOOD, UNIFORM, UNIFORM, 1.5),
        "share is 1.5",
    ),
    "a discount factor above one": (lambda: penalty_coefficient(1.0, 1.5), "gamma is 1.5"),
    "a negative advantage": (lambda: penalty_coefficient(-1.0, 0.5), "advantage is -1.0"),
    "a step not taken": (
        lambda: improvement_bound(StepReport(Outcome.ZERO_GRADIENT), advantage=1.0, gamma=0.9),
        "not taken.*ZERO_GRADIENT",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_makes_no_sense_is_refused_by_name(name: str) -> None:
    call, message = REFUSED[name]
    with pytest.raises(TrustRegionError, match=message):
        call()


def test_policies_of_many_actions_in_single_precision_are_probabilities() -> None:
    """Rounding of so many terms leaves up to 2e-6 beside 1; how much depends on the machine."""
    torch.manual_seed(0)
    exact = (3 * torch.randn(2, 500, 5000).double()).softmax(-1)
    old, new = (exact * (1 + 2e-6)).float()
    for policy in (old, new):
        assert ((policy.double().sum(-1) - 1).abs() > 1.5e-6).all()
    expected = kl_by_state(*exact)
    torch.testing.assert_close(kl_by_state(old, new).double(), expected, rtol=1e-4, atol=1e-4)
