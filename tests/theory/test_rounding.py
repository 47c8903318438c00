"""What rounding must not do to exact processes: ties, probabilities in single precision."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from trpo_optim import TrustRegionError
from trpo_optim.theory import TabularMDP, kl_by_state, mean_kl_divergence, policy_iteration_step

DOUBLE = torch.float64


def with_ties(seed: int) -> TabularMDP:
    draw = torch.Generator().manual_seed(seed)
    weights = torch.randint(0, 3, (3, 3, 3), generator=draw).to(DOUBLE)
    weights[weights.sum(-1) == 0] = 1
    rewards = torch.randint(-1, 2, (3, 3), generator=draw).to(DOUBLE)
    return TabularMDP(weights / weights.sum(-1, keepdim=True), rewards, uniform(), 0.9)


def uniform(*shape: int) -> Tensor:
    return torch.full((*shape, 3), 1 / 3, dtype=DOUBLE)


def test_policy_iteration_ends_where_actions_are_equal_up_to_rounding() -> None:
    for seed in range(200):
        mdp, policy = with_ties(seed), uniform(3)
        for _ in range(20):
            better = policy_iteration_step(mdp, policy)
            if torch.equal(better, policy):
                break
            policy = better
        else:
            pytest.fail(f"It has not ended after 20 steps, with seed {seed}.")


@pytest.mark.parametrize("gamma", [0.9, 0.9999, 1 - 1e-7, 1 - 5e-8])
def test_probabilities_in_single_precision_lose_no_mass(gamma: float) -> None:
    thirds = torch.full((3, 3), 1 / 3)
    mdp = TabularMDP(thirds.expand(3, 3, 3), torch.ones(3, 3), thirds[0], gamma)
    expected = 1 / (1 - gamma)
    assert mdp.expected_return(thirds) == pytest.approx(expected, rel=1e-6)
    assert float(mdp.visitation(thirds).sum()) == pytest.approx(expected, rel=1e-6)
    assert mdp.surrogate(thirds, thirds) == pytest.approx(expected, rel=1e-6)


HALVES = [torch.bfloat16, torch.float16]


@pytest.mark.parametrize("actions", [2, 3, 100, 5000])
@pytest.mark.parametrize("dtype", [torch.float32, *HALVES])
def test_a_softmax_of_any_precision_gives_probabilities(dtype: torch.dtype, actions: int) -> None:
    torch.manual_seed(0)
    logits = 3 * torch.randn(2, 100, actions)
    for policies in (logits.to(dtype).softmax(-1), logits.double().softmax(-1).to(dtype)):
        assert (kl_by_state(*policies) >= 0).all()  # infinite where a probability is rounded to 0


@pytest.mark.parametrize(
    ("dtype", "excess"),
    [(torch.float64, 1e-5), (torch.float32, 1e-5), (torch.float16, 4e-3), (torch.bfloat16, 3e-2)],
)
def test_what_no_rounding_leaves_is_no_probability(dtype: torch.dtype, excess: float) -> None:
    even = torch.tensor([[0.5, 0.5]], dtype=dtype)
    for sign in (1, -1):
        with pytest.raises(TrustRegionError, match="old policy holds no probabilities"):
            kl_by_state(even + torch.tensor([sign * excess, 0.0], dtype=dtype), even)


def test_a_state_that_is_never_visited_adds_nothing_to_the_mean_kl() -> None:
    chain = torch.tensor([[[1.0, 0.0]] * 2, [[0.0, 1.0]] * 2])
    mdp = TabularMDP(chain, torch.zeros(2, 2), torch.tensor([1.0, 0.0]), 0.9)
    old = torch.full((2, 2), 0.5)
    assert mean_kl_divergence(mdp, old, torch.tensor([[0.5, 0.5], [0.0, 1.0]])) == 0
    assert mean_kl_divergence(mdp, old, torch.tensor([[0.0, 1.0], [0.5, 0.5]])) == torch.inf
    with pytest.raises(TrustRegionError, match="new policy holds no probabilities"):
        mean_kl_divergence(mdp, old, torch.tensor([[3.0, 4.0], [0.5, 0.5]]))


@pytest.mark.parametrize(("gamma", "gap"), [(0.99999, 1e-4), (0.999999, 1e-2)])
def test_a_small_advantage_counts_however_far_one_looks_ahead(gamma: float, gap: float) -> None:
    chain = torch.full((2, 2, 2), 0.5)
    rewards = torch.tensor([[1.0, 1.0 + gap]] * 2, dtype=DOUBLE)
    mdp = TabularMDP(chain, rewards, torch.tensor([0.5, 0.5]), gamma)
    found = policy_iteration_step(mdp, torch.full((2, 2), 0.5, dtype=DOUBLE))
    assert found.tolist() == [[0, 1], [0, 1]]
