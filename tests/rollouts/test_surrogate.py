"""The surrogate and the closures that are built on it, beside handwritten ones."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import gymnasium as gym
import pytest
import torch
from devices import each_device
from pendulum_batches import feedforward, vector_of
from torch import Tensor, nn
from torch.distributions import Categorical, Distribution

from trpo_optim import (
    Closures,
    TrustRegionError,
    TrustRegionOptimizer,
    frozen,
    log_prob,
    mean_kl,
)
from trpo_optim.rollouts import (
    SinglePathBatch,
    policy_closure,
    single_path,
    surrogate,
)
from trpo_optim.testing import check_closure
from trpo_optim.theory import random_mdp


def test_it_is_the_exact_surrogate_when_every_action_is_weighted_by_its_share() -> None:
    """Eq. 14 by enumeration: states by the visitation, actions by any q."""
    mdp = random_mdp(5, 3, 0.9, seed=0)
    noise = torch.Generator().manual_seed(1)
    old, new, q = (
        torch.randn((5, 3), generator=noise, dtype=torch.float64).softmax(1) for _ in range(3)
    )
    share = (1 - mdp.gamma) * mdp.visitation(old)[:, None] * q  # of each (s, a), sums to 1
    for advantages in (mdp.action_values(old), mdp.advantages(old)):
        weights = (share * share.numel()).reshape(-1)
        loss = surrogate(
            new.log().reshape(-1), q.log().reshape(-1), advantages.reshape(-1), weights=weights
        )
        expected = (1 - mdp.gamma) * float(mdp.visitation(old) @ (new * advantages).sum(1))
        assert float(loss.detach()) == pytest.approx(-expected, abs=1e-12)
    rise = (mdp.surrogate(old, new) - mdp.expected_return(old)) * (1 - mdp.gamma)
    assert float(loss.detach()) == pytest.approx(-rise, abs=1e-12)


def by_hand(policy: Any, batch: SinglePathBatch, advantages: Tensor, bonus: float = 0.0) -> Any:
    """The closure as one writes it oneself."""
    observations, actions = batch.flat(batch.observations), batch.flat(batch.actions)
    advantages = batch.flat(advantages)
    with torch.no_grad():
        old = frozen(policy(observations))
        old_log_prob = log_prob(old, actions)

    def closure() -> tuple[Tensor, Tensor]:
        dist = policy(observations)
        ratio = (dist.log_prob(actions) - old_log_prob).exp()
        loss = -(ratio * advantages).mean() - bonus * dist.entropy().mean()
        return loss, mean_kl(old, dist)

    return closure


@each_device
@pytest.mark.parametrize("micro_batch", [None, 33])
@pytest.mark.parametrize("bonus", [0.0, 0.1])
def test_the_built_closure_takes_the_handwritten_ones_step(
    micro_batch: int | None, bonus: float, device: str
) -> None:
    policy, batch, advantages = feedforward(device=device)
    before = {name: value.clone() for name, value in policy.state_dict().items()}
    expected = TrustRegionOptimizer(policy.parameters(), engine="torch.func").step(
        by_hand(policy, batch, advantages, bonus)
    )
    wanted = vector_of(policy)
    policy.load_state_dict(before)
    built = policy_closure(policy, batch, advantages, entropy_bonus=bonus, micro_batch=micro_batch)
    report = TrustRegionOptimizer(policy.parameters(), engine="Gauss-Newton").step(built)
    torch.testing.assert_close(vector_of(policy), wanted, rtol=1e-4, atol=1e-6)
    assert report.kl == pytest.approx(expected.kl, rel=1e-3)
    assert report.largest_kl > report.kl
    assert report.engine == "Gauss-Newton"


@each_device
def test_curvature_is_taken_on_a_share_drawn_by_the_generator(device: str) -> None:
    policy, batch, advantages = feedforward(device=device)
    rows = []

    def watched(seen: Tensor) -> Distribution:
        rows.append(len(seen))
        dist: Distribution = policy(seen)
        return dist

    noise = torch.Generator().manual_seed(3)
    built = policy_closure(watched, batch, advantages, curvature=0.1, generator=noise)
    count = int(batch.valid.sum())
    assert sorted(rows) == sorted([count, round(0.1 * count)])
    assert built.curvature is not None
    first = built.curvature()[1]
    again = policy_closure(
        policy, batch, advantages, curvature=0.1, generator=torch.Generator().manual_seed(3)
    )
    assert again.curvature is not None
    assert torch.equal(first, again.curvature()[1])
    assert TrustRegionOptimizer(policy.parameters()).step(built).accepted


@pytest.mark.parametrize(
    "options", [{}, {"micro_batch": 64}, {"curvature": 0.2}, {"curvature": 0.2, "micro_batch": 64}]
)
def test_dropout_masks_are_those_of_the_step_that_follows(options: dict[str, Any]) -> None:
    policy, batch, advantages = feedforward()
    policy.network.insert(2, nn.Dropout(0.3))
    report = TrustRegionOptimizer(policy.parameters()).step(
        policy_closure(policy, batch, advantages, **options)
    )
    assert report.accepted


def test_a_kl_without_a_closed_form_is_estimated_on_the_actions() -> None:
    policy, batch, advantages = feedforward()
    report = TrustRegionOptimizer(policy.parameters()).step(
        policy_closure(policy, batch, advantages, sampled=True)
    )
    assert report.accepted
    assert 0 < report.kl <= 0.01


@each_device
def test_the_kit_finds_no_fault_with_built_closures(device: str) -> None:
    for micro_batch in (None, 100):
        policy, batch, advantages = feedforward(device=device)
        built = policy_closure(policy, batch, advantages, micro_batch=micro_batch)
        assert check_closure(built, policy.parameters()).passed


def test_called_the_parts_are_their_weighted_mean() -> None:
    policy, batch, advantages = feedforward()
    whole, parts = (policy_closure(policy, batch, advantages, micro_batch=n) for n in (None, 60))
    loss, kl = parts()[:2]
    assert float(loss.detach()) == pytest.approx(float(whole()[0].detach()), rel=1e-5)
    assert kl.shape == ()
    assert isinstance(parts, Closures)


def test_closures_bring_their_own_weights_and_curvature() -> None:
    policy, batch, advantages = feedforward()
    built = policy_closure(policy, batch, advantages)
    with pytest.raises(TrustRegionError, match="both a Closures object and weights"):
        TrustRegionOptimizer(policy.parameters()).step(built, curvature=built)


POLICY, BATCH, ADVANTAGES = feedforward()
ROW = torch.zeros(4)


def building(advantages: Tensor = ADVANTAGES, **options: Any) -> Callable[[], object]:
    return lambda: policy_closure(POLICY, BATCH, advantages, **options)


def one_nan() -> Tensor:
    advantages = torch.zeros(50, 4)
    advantages[7, 2] = math.nan
    return advantages


def nothing_valid() -> object:
    batch = feedforward()[1]
    batch.valid[:] = False
    return policy_closure(POLICY, batch, ADVANTAGES)


REFUSED: dict[str, tuple[Callable[[], object], str]] = {
    "advantages of flat rows": (
        building(torch.zeros(200)),
        r"advantages has shape \(200,\) and the batch \(50, 4\)",
    ),
    "NaN advantages": (building(one_nan()), "advantages is nan at step 7 of environment 2"),
    "infinite weights": (
        building(weights=torch.full((50, 4), math.inf)),
        "weights is inf at step 0 of environment 0",
    ),
    "negative weights": (
        building(weights=torch.full((50, 4), -0.5)),
        "weights holds -0.5; a weight is a ratio",
    ),
    "a batch of another kind": (
        lambda: policy_closure(POLICY, (BATCH, ADVANTAGES), ADVANTAGES),  # type: ignore[arg-type]  # the mistake
        "got a tuple; it takes what single_path",
    ),
    "an action's dimensions apart": (
        lambda: policy_closure(lambda seen: POLICY(seen).base_dist, BATCH, ADVANTAGES),
        r"Normal has batch shape \(\d+, 1\) and no event shape.*Independent\(dist, 1\)",
    ),
    "an empty batch": (nothing_valid, "no row is valid"),
    "all for the curvature": (building(curvature=1.0), r"curvature is 1.0.*in \(0, 1\)"),
    "no micro-batch": (building(micro_batch=0), "micro_batch is 0"),
    "half a row": (building(micro_batch=64.0), "micro_batch is 64.0; it must be a whole number"),
    "no bonus": (building(entropy_bonus=math.nan), "entropy_bonus is nan"),
    "another's actions for the KL": (
        building(sampled=True, sampling_log_prob=torch.zeros(50, 4)),
        "needs actions of the old policy",
    ),
    "lengths": (lambda: surrogate(ROW, ROW, ROW[:2]), r"advantages has shape \(2,\)"),
    "a column": (
        lambda: surrogate(ROW, ROW[:, None], ROW),
        r"sampling_log_prob has shape \(4, 1\)",
    ),
    "no actions": (lambda: surrogate(ROW[:0], ROW[:0], ROW[:0]), "The batch is empty"),
    "a graph": (
        lambda: surrogate(ROW, ROW.clone().requires_grad_(), ROW),
        "sampling_log_prob requires grad",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_makes_no_sense_is_refused_by_name(name: str) -> None:
    call, message = REFUSED[name]
    with pytest.raises(TrustRegionError, match=message):
        call()


def test_discrete_actions_with_whole_episodes_and_idle_environments() -> None:
    torch.manual_seed(0)
    network = nn.Linear(4, 2)
    envs = gym.make_vec("CartPole-v1", 4, vectorization_mode="sync")
    policy = lambda seen: Categorical(logits=network(seen))  # noqa: E731
    batch = single_path(envs, policy, episodes=3, seed=0)
    advantages = torch.randn(batch.rewards.shape)
    report = TrustRegionOptimizer(network.parameters()).step(
        policy_closure(policy, batch, advantages)
    )
    assert report.accepted
