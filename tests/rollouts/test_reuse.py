"""Closures on several batches: each ratio is taken to what drew the action."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from devices import each_device
from earlier_batches import Batches, feedforward_batches, recurrent_batches, stirred
from enumerated import GAMMA, by_logits, enumeration, exact_gradient, layered, random_logits
from pendulum_batches import vector_of
from torch import Tensor, nn

from trpo_optim import TrustRegionOptimizer, frozen, mean_kl
from trpo_optim.rollouts import (
    PolicyClosures,
    SinglePathBatch,
    gae,
    policy_closure,
    trajectory_weights,
)
from trpo_optim.testing import check_closure


def by_hand(batches: Batches, bonus: float = 0.0) -> Any:
    """The closure on all rows as one writes it oneself."""
    policy, parts, advantages = batches
    seen, actions, base = (
        torch.cat([part.flat(getattr(part, name)) for part in parts])
        for name in ("observations", "actions", "log_prob")
    )
    flat = torch.cat([part.flat(each) for part, each in zip(parts, advantages, strict=True)])
    with torch.no_grad():
        old = frozen(policy(seen))

    def closure() -> tuple[Tensor, Tensor]:
        dist = policy(seen)
        ratio = (dist.log_prob(actions) - base).exp()
        return -(ratio * flat).mean() - bonus * dist.entropy().mean(), mean_kl(old, dist)

    return closure


def taken(batches: Batches, built: Any, engine: Any = "auto", **options: Any) -> tuple[Tensor, Any]:
    """Return the step on a closure, and its report, and put the policy back."""
    policy = batches[0]
    before = vector_of(policy)
    report = TrustRegionOptimizer(policy.parameters(), engine=engine, **options).step(built)
    step = vector_of(policy) - before
    torch.nn.utils.vector_to_parameters(before, policy.parameters())
    assert report.accepted
    return step, report


@each_device
@pytest.mark.parametrize("micro_batch", [None, 77])
@pytest.mark.parametrize("bonus", [0.0, 0.1])
def test_several_batches_take_the_handwritten_closures_step(
    micro_batch: int | None, bonus: float, device: str
) -> None:
    batches = feedforward_batches(device)
    expected, by = taken(batches, by_hand(batches, bonus), "torch.func")
    built = policy_closure(*batches, entropy_bonus=bonus, micro_batch=micro_batch)
    found, report = taken(batches, built, "Gauss-Newton")
    assert float((found - expected).norm()) < 1e-3 * float(expected.norm())
    assert report.kl == pytest.approx(by.kl, rel=1e-3)
    assert built.batches == (0, 1, 2)
    assert len(built.parts) == (1 if micro_batch is None else 5)
    alone, _ = taken(batches, policy_closure(batches[0], batches[1][0], batches[2][0]))
    assert torch.cosine_similarity(alone, expected, dim=0) < 0.9  # the others have a say


def test_a_list_of_one_batch_of_the_present_policy_is_that_batch() -> None:
    policy, batches, advantages = feedforward_batches()
    one = policy_closure(policy, batches[0], advantages[0], standardise=True)
    listed = policy_closure(policy, [batches[0]], [advantages[0]], standardise=True)
    every = policy, batches, advantages
    torch.testing.assert_close(taken(every, listed)[0], taken(every, one)[0], rtol=1e-3, atol=1e-6)


def test_a_newest_batch_of_another_policy_counts_by_its_ratios() -> None:
    policy, batches, advantages = feedforward_batches()
    batch, own = batches[1], advantages[1]
    with torch.no_grad():
        ratios = (policy(batch.observations).log_prob(batch.actions) - batch.log_prob).exp()
    loss = policy_closure(policy, [batch], [own])()[0]
    assert float(loss.detach()) == pytest.approx(-float(batch.flat(ratios * own).mean()), rel=1e-5)


def test_batches_of_several_policies_give_the_exact_gradient() -> None:
    """All trajectories of two other policies, by enumeration, one of them at half weight."""
    mdp, present = layered(0), random_logits(1)
    every = [enumeration(mdp, random_logits(seed)) for seed in (2, 3)]
    batches = [each.batch for each in every]
    advantages, weights = [], []
    for each in every:
        batch = each.batch
        ratios = batch.log_ratios(by_logits(present))
        nothing = torch.zeros_like(batch.rewards)
        options = {"gamma": GAMMA, "gae_lambda": 1.0, "largest": float("inf")}
        advantages.append(
            gae(batch.rewards, nothing, nothing, batch.ends, log_ratios=ratios, **options)
        )
        weights.append(each.weights() * trajectory_weights(ratios, batch.starts))
    logits = present.clone().requires_grad_()
    built = policy_closure(
        by_logits(logits), batches, advantages, weights=weights, batch_weights=(1.0, 0.5)
    )
    (gradient,) = torch.autograd.grad(built()[0], logits)
    torch.testing.assert_close(-gradient, exact_gradient(mdp, present), rtol=0, atol=1e-9)


@pytest.mark.parametrize("standardise", [False, True])
@pytest.mark.parametrize("most", [4096, 100])
def test_a_batch_of_weight_two_counts_as_if_it_were_there_twice(
    most: int, standardise: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("trpo_optim.rollouts.curvature_rows._MOST", most)
    policy, batches, advantages = feedforward_batches()
    every = policy, batches, advantages
    twice = policy_closure(
        policy,
        [batches[0], *batches],
        [advantages[0], *advantages],
        curvature=None,
        standardise=standardise,
    )
    built = policy_closure(*every, batch_weights=(2.0, 1.0, 1.0), standardise=standardise)
    expected, by = taken(every, twice, "Gauss-Newton")
    found, report = taken(every, built, "Gauss-Newton")
    assert float(built()[0].detach()) == pytest.approx(float(twice()[0].detach()), rel=1e-5)
    assert (built.curvature is None) == (most == 4096)
    if built.curvature is None:
        torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-6)
        assert report.largest_kl == pytest.approx(by.largest_kl, rel=1e-3)
    else:
        assert torch.cosine_similarity(found, expected, dim=0) > 0.95


def test_rows_for_curvature_weigh_as_their_batches() -> None:
    """On all rows but one, the mean KL is almost the weighted one, which equal weights miss."""
    policy, batches, advantages = feedforward_batches()
    weights = (5.0, 1.0, 0.2)
    count = sum(int(batch.valid.sum()) for batch in batches)
    built = policy_closure(
        policy, batches, advantages, batch_weights=weights, curvature=1 - 1 / count
    )
    plain = policy_closure(policy, batches, advantages, curvature=1 - 1 / count)
    with torch.no_grad():
        policy.network[2].weight.add_(0.3)
        assert built.curvature is not None
        assert plain.curvature is not None
        found, without = (each.curvature()[1].mean() for each in (built, plain))  # type: ignore[misc]  # as asserted
        expected = built()[1]
    assert float(found) == pytest.approx(float(expected), rel=0.01)
    assert float(without) != pytest.approx(float(expected), rel=0.05)


def test_curvature_rows_come_from_all_batches() -> None:
    policy, batches, advantages = feedforward_batches()
    seen = []

    def watched(rows: Tensor) -> Any:
        seen.append(rows)
        return policy(rows)

    noise = torch.Generator().manual_seed(3)
    policy_closure(watched, batches, advantages, curvature=0.2, generator=noise)
    whole, part = sorted(seen, key=len, reverse=True)
    assert len(part) == round(0.2 * len(whole))
    places = (part[:, None] == whole).all(-1).float().argmax(1)
    counts = [int(batch.valid.sum()) for batch in batches]
    found = torch.bucketize(places, torch.tensor(counts).cumsum(0), right=True).bincount()
    assert found.min() > 0.5 * 0.2 * min(counts)
    assert len(found) == 3


def test_advantages_are_standardised_over_all_rows() -> None:
    policy, batches, advantages = feedforward_batches()
    shifted = [each + 3.0 * index for index, each in enumerate(advantages)]
    flat = torch.cat([batch.flat(each) for batch, each in zip(batches, shifted, strict=True)])
    mean, deviation = flat.double().mean(), flat.double().std(correction=0)
    by_rows = [((each - mean) / deviation).float() for each in shifted]
    losses = [
        float(policy_closure(policy, batches, each, standardise=flag)()[0].detach())
        for each, flag in ((shifted, True), (by_rows, False))
    ]
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)


def test_weights_of_states_may_be_left_out_for_the_newest() -> None:
    policy, batches, advantages = feedforward_batches()
    weights = [
        None,
        *(trajectory_weights(each.log_ratios(policy), each.starts) for each in batches[1:]),
    ]
    built = policy_closure(policy, batches, advantages, weights=weights)
    ones = [torch.ones_like(advantages[0]), *weights[1:]]
    whole = policy_closure(policy, batches, advantages, weights=ones)
    plain = policy_closure(policy, batches, advantages)
    losses = [float(each()[0].detach()) for each in (built, whole, plain)]
    assert losses[0] == losses[1] != losses[2]


@pytest.mark.parametrize("micro_batch", [None, 3])
def test_recurrent_batches_of_different_lengths_stand_side_by_side(
    micro_batch: int | None,
) -> None:
    policy, batches, advantages = recurrent_batches()
    built = policy_closure(policy, batches, advantages, micro_batch=micro_batch)
    assert len(built.parts) == (1 if micro_batch is None else 3)
    with torch.no_grad():
        policy.head.bias.add_(0.1)
        losses, kls = [], []
        for batch, own in zip(batches, advantages, strict=True):
            dist, _ = policy(batch.observations, batch.state, batch.starts)
            ratios = (dist.log_prob(batch.actions) - batch.log_prob).exp()
            losses.append(batch.flat(ratios * own))
            kls.append(torch.full_like(losses[-1], 0.1**2 / 2))
        loss, kl = built()[:2]
    assert float(loss) == pytest.approx(-float(torch.cat(losses).mean()), rel=1e-4)
    assert float(kl.mean()) == pytest.approx(float(torch.cat(kls).mean()), rel=1e-4)
    if micro_batch is None:
        assert kl.shape == torch.cat(kls).shape
    with torch.no_grad():
        policy.head.bias.sub_(0.1)
    assert TrustRegionOptimizer(policy.parameters(), cg_iterations=3).step(built).accepted


def kl_of(policy: Any, batch: SinglePathBatch) -> float:
    """KL(behaviour ‖ present) on the batch's actions, as the limit takes it."""
    logs = batch.flat(batch.log_ratios(policy))
    return float((logs.exp() - 1 - logs).mean())


def test_batches_of_policies_too_far_away_are_left_out() -> None:
    policy, batches, advantages = feedforward_batches()
    every = policy, batches, advantages
    near, far = (kl_of(policy, each) for each in batches[1:])
    assert 0 < near < far
    limits: list[tuple[float | None, tuple[int, ...]]] = [
        (None, (0, 1, 2)),
        (1.01 * far, (0, 1, 2)),
        (0.99 * far, (0, 1)),
        (0.5 * near, (0,)),
    ]
    for limit, counted in limits:
        built = policy_closure(*every, max_batch_kl=limit, standardise=True)
        assert isinstance(built, PolicyClosures)
        assert built.batches == counted
        expected = policy_closure(
            policy,
            [batches[index] for index in counted],
            [advantages[index] for index in counted],
            standardise=True,
        )
        assert torch.equal(taken(every, built)[0], taken(every, expected)[0])
    stirred(policy, 9, size=1.0)
    assert kl_of(policy, batches[0]) > 0.5
    assert policy_closure(*every, max_batch_kl=1e-6).batches == (0,)  # the newest always counts


def test_a_batch_whose_actions_are_ruled_out_now_is_too_far_away() -> None:
    mdp = layered(0)
    first, second = (enumeration(mdp, random_logits(seed)).batch for seed in (1, 2))
    logits = random_logits(1)
    logits[2, 0] = -torch.inf
    given = by_logits(logits), [first, second], [torch.ones(4, 256).double()] * 2
    assert policy_closure(*given, max_batch_kl=1e6).batches == (0,)
    loss = policy_closure(*given)()[0]
    assert loss.isfinite()


def test_the_kit_finds_no_fault_with_closures_on_several_batches() -> None:
    policy, batches, advantages = feedforward_batches()
    for options in ({}, {"batch_weights": (1.0, 0.5, 0.25)}, {"micro_batch": 100}):
        built = policy_closure(policy, batches, advantages, **options)
        assert check_closure(built, policy.parameters()).passed


@pytest.mark.parametrize("options", [{}, {"micro_batch": 64}, {"max_batch_kl": 1.0}])
def test_dropout_masks_are_those_of_the_step_that_follows(options: dict[str, Any]) -> None:
    policy, batches, advantages = feedforward_batches()
    policy.network.insert(2, nn.Dropout(0.3))
    before = torch.get_rng_state()
    built = policy_closure(policy, batches, advantages, **options)
    assert torch.equal(torch.get_rng_state(), before)
    assert TrustRegionOptimizer(policy.parameters()).step(built).accepted
