"""One step over several processes: the same as over one, and the same on each."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Sequence
from typing import Any

import gymnasium as gym
import pytest
import torch
import torch.distributed as dist
from devices import needs_gpu
from gymnasium.vector import SyncVectorEnv
from problems import Problem, gaussian
from ranks import on_ranks, values_of
from torch import Tensor, nn
from torch.distributions import Categorical, kl_divergence

from trpo_optim import Closures, StepReport, TrustRegionOptimizer, joint_kl
from trpo_optim.rollouts import policy_closure, single_path

pytestmark = [pytest.mark.ranks, pytest.mark.no_cover]

SAMPLES = 96

Cut = list[list[int]]
"""For every rank the sizes of its closures' batches, one after the other."""

CUTS: dict[str, Cut] = {
    "1": [[96]],
    "2 even": [[48], [48]],
    "2 uneven": [[90], [6]],
    "3 even": [[32], [32], [32]],
    "3, one with none": [[60], [], [36]],
    "3, one of weight 0": [[60], [0], [36]],
    "4 even": [[24], [24], [24], [24]],
    "4 uneven": [[1], [50], [40], [5]],
    "2 in micro-batches": [[20, 30], [40, 6]],
    "3 in micro-batches, unlike": [[20, 30, 6], [40], []],
}


def problem(dtype: torch.dtype, device: str = "cpu") -> Problem:
    """Return what every rank builds; a step is 7 % of the parameters' length."""
    return gaussian(dtype=dtype, device=device, samples=SAMPLES, hidden=32)


def trained(
    task: Problem,
    group: Any,
    rank: int,
    cut: Cut,
    *,
    steps: int,
    third: bool,
    settings: dict[str, Any],
) -> tuple[Tensor, list[StepReport]]:
    """Take steps on batches of which this rank has its share."""
    like = task.observations
    optimizer = task.optimizer(process_group=group, **settings)
    reports = []
    for step in range(steps):
        torch.manual_seed(step)
        observations, noise, advantages = (
            torch.randn(SAMPLES, *size, dtype=like.dtype).to(like) for size in ((4,), (2,), ())
        )
        sizes = cut[rank]
        start = sum(sum(each) for each in cut[:rank])
        closures = []
        for size in sizes:
            rows = slice(start, start + size)
            closures.append(on_rows(task, observations[rows], noise[rows], advantages[rows], third))
            start += size
        reports.append(optimizer.step(closures, weights=sizes))
    return task.vector().cpu(), reports


def on_rows(
    task: Problem, observations: Tensor, noise: Tensor, advantages: Tensor, third: bool
) -> Any:
    """Return the closure of some rows; without any it cannot be called."""
    if not len(observations):
        return min
    with torch.no_grad():
        old = task.policy(observations)
        actions = old.base_dist.loc + old.base_dist.scale * noise
        old_log_prob = old.log_prob(actions)

    def closure() -> Any:
        dist_ = task.policy(observations)
        ratio = (dist_.log_prob(actions) - old_log_prob).exp()
        pair = -(ratio * advantages).mean(), kl_divergence(old, dist_).mean()
        return (*pair, dist_) if third else pair

    return closure


Variant = tuple[str, torch.dtype, bool]
"""The mode, the precision, and whether the closures return the distribution too."""

VARIANTS: list[Variant] = [
    ("trpo", torch.float32, False),
    ("trpo", torch.float64, True),
    ("natural", torch.float32, True),
    ("natural", torch.float64, False),
    ("vanilla", torch.float32, False),
    ("vanilla", torch.float64, True),
]
TOLERANCE = {torch.float32: 1e-5, torch.float64: 1e-12}


def all_variants(
    rank: int, cut: Cut, steps: int, device: str = "cpu"
) -> list[tuple[Tensor, list[StepReport]]]:
    """Train in all modes and both precisions, with and without the third value."""
    group = dist.group.WORLD if dist.is_initialized() else None
    found = []
    for mode, dtype, third in VARIANTS:
        settings: dict[str, Any] = {"mode": mode, **({"lr": 0.1} if mode == "vanilla" else {})}
        settings["engine"] = "Gauss-Newton" if third else "torch.func"  # also in micro-batches
        task = problem(dtype, device)
        found.append(trained(task, group, rank, cut, steps=steps, third=third, settings=settings))
    return found


@functools.cache
def by_one_process(steps: int, device: str = "cpu") -> list[tuple[Tensor, list[StepReport]]]:
    """Train without a group, on every sample."""
    return all_variants(0, [[SAMPLES]], steps, device)


ONE_OF_EACH_KIND = ["1", "2 uneven", "3, one of weight 0", "3 in micro-batches, unlike"]


@pytest.mark.parametrize(
    ("name", "steps"),
    [
        *((name, 3) for name in ONE_OF_EACH_KIND),
        *(pytest.param(name, 20, marks=pytest.mark.thorough) for name in CUTS),
    ],
)
def test_steps_are_those_of_one_process(name: str, steps: int) -> None:
    cut = CUTS[name]
    found = values_of(on_ranks(len(cut), all_variants, cut, steps))
    require_the_same(by_one_process(steps), found)


@needs_gpu
@pytest.mark.parametrize(("backend", "cut"), [("nccl", CUTS["1"]), ("gloo", CUTS["2 uneven"])])
def test_steps_on_a_gpu_are_those_of_one_process(backend: str, cut: Cut) -> None:
    """NCCL takes one rank a card, gloo several."""
    found = values_of(on_ranks(len(cut), all_variants, cut, 20, "cuda", backend=backend))
    require_the_same(by_one_process(20, "cuda"), found)


def require_the_same(alone: Sequence[Any], found: Sequence[Any]) -> None:
    """Check that all ranks end where one process does, and at the same bits."""
    for (_, dtype, _), (expected, reports), *ranks in zip(VARIANTS, alone, *found, strict=True):
        for vector, theirs in ranks:
            assert float((vector - expected).norm() / expected.norm()) < TOLERANCE[dtype]
            assert torch.equal(vector, ranks[0][0])
            assert theirs == ranks[0][1]
        assert [each.outcome for each in ranks[0][1]] == [each.outcome for each in reports]


SETTINGS: dict[str, dict[str, Any]] = {
    "largest KL": {"constraint": "max", "max_kl": 0.05},
    "curvature on a part": {"max_kl": 0.02},
    "objective": {"maximize": True},
    "natural by rate": {"mode": "natural", "max_kl": None, "lr": 1e-3},
    "vanilla by length": {"mode": "vanilla", "max_norm": 0.05},
}
SHARES = [range(64), range(0), range(64, SAMPLES)]
"""Which rows each of three ranks has."""
PARTS = [range(32), range(0), range(64, 80)]
"""Which of them give the curvature, where that is on a part."""


def two_steps(
    group: Any, name: str, rows: Sequence[int], part: Sequence[int]
) -> tuple[Tensor, StepReport]:
    """Take two steps on rows of one batch, the closures' KL that of every sample."""
    task = problem(torch.float64)
    optimizer = task.optimizer(process_group=group, **SETTINGS[name])

    def closure_on(chosen: Sequence[int]) -> Any:
        observations, actions = task.observations[chosen], task.actions[chosen]
        with torch.no_grad():
            old = task.policy(observations)

        def closure() -> Any:
            new = task.policy(observations)
            gain = (new.log_prob(actions) - old.log_prob(actions)).exp() * task.advantages[chosen]
            return (gain if name == "objective" else -gain).mean(), joint_kl(old, new)

        return closure

    for _ in range(2):
        curvature = closure_on(part) if name == "curvature on a part" and part else None
        closures = [closure_on(rows)] if rows else []
        report = optimizer.step(closures, weights=[len(rows)] if rows else [], curvature=curvature)
    return task.vector(), report


def two_shared_steps(rank: int, name: str) -> tuple[Tensor, StepReport]:
    """Take them on this rank's share."""
    return two_steps(dist.group.WORLD, name, SHARES[rank], PARTS[rank])


@pytest.mark.parametrize("name", SETTINGS)
def test_other_settings_step_as_one_process_does(name: str) -> None:
    expected, alone = two_steps(None, name, [*itertools.chain(*SHARES)], [*itertools.chain(*PARTS)])
    for vector, report in values_of(on_ranks(3, two_shared_steps, name)):
        torch.testing.assert_close(vector, expected, rtol=1e-10, atol=1e-13)
        assert report.accepted
        assert report.largest_kl == pytest.approx(alone.largest_kl, rel=1e-9, nan_ok=True)
        assert report.loss_after == pytest.approx(alone.loss_after, rel=1e-9)


def collected(rank: int, policy: nn.Module) -> Any:
    """Return a batch of CartPole-v1 of the rank's own size, and advantages for it."""
    torch.manual_seed(rank)
    envs = SyncVectorEnv([lambda: gym.make("CartPole-v1")] * 2)

    def act(observations: Tensor) -> Categorical:
        return Categorical(logits=policy(observations))

    batch = single_path(envs, act, steps=[30, 70][rank], seed=rank)
    return act, batch, torch.randn(batch.rewards.shape)


def network() -> nn.Sequential:
    """Return a network for CartPole-v1."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 16), nn.Tanh(), nn.Linear(16, 2))


def on_own_rollout(rank: int) -> tuple[Tensor, StepReport]:
    """Step on a batch of this rank's own."""
    policy = network()
    optimizer = TrustRegionOptimizer(policy.parameters(), process_group=dist.group.WORLD)
    report = optimizer.step(policy_closure(*collected(rank, policy)))
    return nn.utils.parameters_to_vector(policy.parameters()).detach(), report


def test_closures_of_rollouts_weigh_ranks_by_their_samples() -> None:
    policy = network()
    closures = [policy_closure(*collected(rank, policy)) for rank in (0, 1)]
    weights = [closure.weights[0] for closure in closures if closure.weights]
    assert weights[0] < weights[1]
    optimizer = TrustRegionOptimizer(policy.parameters(), engine="Gauss-Newton")
    optimizer.step([closure.parts[0] for closure in closures], weights=weights)
    expected = nn.utils.parameters_to_vector(policy.parameters()).detach()
    for vector, report in values_of(on_ranks(2, on_own_rollout)):
        torch.testing.assert_close(vector, expected, rtol=1e-4, atol=1e-6)
        assert report.accepted


def half_of_the_second(rank: int, policy: nn.Module) -> Closures:
    """Return a rank's closures, the products of the second rank on a half of its rows."""
    noise = torch.Generator().manual_seed(0)
    curvature = 0.5 if rank else None
    return policy_closure(*collected(rank, policy), curvature=curvature, generator=noise)


def on_own_part(rank: int) -> tuple[Tensor, StepReport]:
    """Step on a batch of this rank's own, which gives the curvature in whole or in part."""
    policy = network()
    optimizer = TrustRegionOptimizer(policy.parameters(), process_group=dist.group.WORLD)
    report = optimizer.step(half_of_the_second(rank, policy))
    return nn.utils.parameters_to_vector(policy.parameters()).detach(), report


def test_the_curvature_of_a_ranks_part_weighs_as_the_ranks_whole_batch() -> None:
    policy = network()
    built = [half_of_the_second(rank, policy) for rank in (0, 1)]
    weights = [float(each.weights[0]) for each in built if each.weights]
    part = built[1].curvature
    assert part is not None

    def curvature() -> Any:
        kls = [closure()[1].mean() for closure in (built[0].parts[0], part)]
        kl = (weights[0] * kls[0] + weights[1] * kls[1]) / sum(weights)
        return kl, kl

    start = nn.utils.parameters_to_vector(policy.parameters()).detach().clone()
    parts = [each.parts[0] for each in built]
    TrustRegionOptimizer(policy.parameters()).step(parts, weights=weights, curvature=curvature)
    expected = nn.utils.parameters_to_vector(policy.parameters()).detach() - start
    for vector, report in values_of(on_ranks(2, on_own_part)):
        assert report.accepted
        torch.testing.assert_close(vector - start, expected, rtol=1e-3, atol=1e-5)
