"""Which KL of the batch is held to the radius: the mean, or the largest of a sample."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from problems import PROBLEMS, Problem, gaussian
from torch import Tensor
from torch.distributions import kl_divergence

from trpo_optim import Outcome, TrustRegionError, TrustRegionOptimizer, joint_kl, mean_kl
from trpo_optim.testing import check_closure

DELTA = 0.01
each_problem = pytest.mark.parametrize("make", PROBLEMS)


def per_sample(problem: Problem, rows: slice = slice(None)) -> Callable[[], tuple[Tensor, Tensor]]:
    """The problem's closure on some rows, with one KL per sample."""
    with torch.no_grad():
        old = problem.policy(problem.observations[rows])

    def closure() -> tuple[Tensor, Tensor]:
        dist = problem.policy(problem.observations[rows])
        ratio = (dist.log_prob(problem.actions[rows]) - problem.old_log_prob[rows]).exp()
        return -(ratio * problem.advantages[rows]).mean(), joint_kl(old, dist)

    return closure


def kls(problem: Problem) -> Tensor:
    """KL(old ‖ new) of every sample where the parameters now are, by torch."""
    with torch.no_grad():
        return kl_divergence(problem.old, problem.policy(problem.observations))


@each_problem
@pytest.mark.parametrize("micro_batches", [False, True])
def test_no_sample_leaves_the_radius_where_the_largest_is_held(
    make: Callable[[], Problem], micro_batches: bool
) -> None:
    problem = make()
    half = len(problem.observations) // 2
    closures = [per_sample(problem, slice(half)), per_sample(problem, slice(half, None))]
    optimizer = problem.optimizer(max_kl=DELTA, constraint="max")
    report = optimizer.step(closures if micro_batches else per_sample(problem))
    largest = float(kls(problem).max())
    assert report.accepted
    assert 0.8 * DELTA < largest <= DELTA
    assert report.largest_kl == report.trial_largest_kl == pytest.approx(largest, rel=1e-9)
    assert report.kl == pytest.approx(float(kls(problem).mean()), rel=1e-9)
    assert report.backtracks <= 4


@each_problem
def test_where_the_mean_is_held_a_sample_may_leave_it(make: Callable[[], Problem]) -> None:
    problem = make()
    report = problem.optimizer(max_kl=DELTA).step(per_sample(problem))
    assert report.kl <= DELTA < report.largest_kl


@each_problem
@pytest.mark.parametrize("mode", ["trpo", "natural", "vanilla"])
def test_one_kl_per_sample_is_the_same_step_as_their_mean(
    make: Callable[[], Problem], mode: str
) -> None:
    one, other = make(), make()
    first = one.optimizer(mode=mode).step(one.closure)
    second = other.optimizer(mode=mode).step(per_sample(other))
    torch.testing.assert_close(one.vector(), other.vector(), rtol=1e-12, atol=1e-14)
    assert first.kl == pytest.approx(second.kl, rel=1e-9)
    assert torch.tensor(first.largest_kl).isnan()


@pytest.mark.parametrize("mode", ["natural", "vanilla"])
def test_a_mode_without_a_search_ignores_it(mode: str) -> None:
    one, other = gaussian(), gaussian()
    assert one.optimizer(mode=mode, constraint="max").step(one.closure).accepted
    other.optimizer(mode=mode).step(other.closure)
    assert torch.equal(one.vector(), other.vector())


def test_the_largest_of_a_scalar_is_not_known() -> None:
    problem = gaussian()
    before = problem.vector()
    optimizer = problem.optimizer(constraint="max")
    for closures in (problem.closure, [per_sample(problem), problem.closure]):
        with pytest.raises(TrustRegionError, match=r"constraint is 'max'.*scalar.*joint_kl"):
            optimizer.step(closures)
    assert torch.equal(problem.vector(), before)


@pytest.mark.parametrize("shape", [(4, 3), (1, 4), (0,)])
def test_a_kl_that_is_neither_one_nor_one_per_sample_is_refused(shape: tuple[int, ...]) -> None:
    parameter = torch.zeros(1, requires_grad=True)
    with pytest.raises(TrustRegionError, match=r"kl has shape.*one KL per sample"):
        TrustRegionOptimizer([parameter]).step(lambda: (parameter.sum(), parameter.expand(shape)))


@pytest.mark.parametrize("value", ["largest", None, True, 0])
def test_another_constraint_is_refused_by_name(value: object) -> None:
    wrong: dict[str, object] = {"constraint": value}
    with pytest.raises(TrustRegionError, match=rf"constraint is {value!r}; it must be 'mean'"):
        gaussian().optimizer(**wrong)


def test_a_sample_that_cannot_come_within_the_radius_ends_the_search() -> None:
    problem = gaussian()
    jump = torch.zeros(len(problem.observations), dtype=torch.float64)
    before = copy.deepcopy(problem.policy.state_dict())
    values = per_sample(problem)

    def closure() -> tuple[Tensor, Tensor]:
        loss, kl = values()
        moved = any(
            not torch.equal(before[name], x) for name, x in problem.policy.named_parameters()
        )
        jump[3] = 1.0 if moved else 0.0
        return loss, kl + jump

    report = problem.optimizer(constraint="max", max_backtracks=3).step(closure)
    assert report.outcome is Outcome.KL_ABOVE_RADIUS
    assert report.trial_largest_kl > 1.0
    assert report.trial_kl > report.kl
    assert problem.optimizer(max_kl=1.0).step(closure).accepted  # the mean is no matter


def test_joint_kl_is_mean_kl_before_its_mean() -> None:
    problem = gaussian()
    with torch.no_grad():
        dist = problem.policy(problem.observations + 0.1)
    mask = torch.arange(len(problem.observations)) % 3 == 0
    torch.testing.assert_close(joint_kl(problem.old, dist), kl_divergence(problem.old, dist))
    assert joint_kl(problem.old, dist, mask).shape == (int(mask.sum()),)
    for chosen in (None, mask):
        mean = joint_kl(problem.old, dist, chosen).mean()
        torch.testing.assert_close(mean, mean_kl(problem.old, dist, chosen))
    with pytest.raises(TrustRegionError, match="mask has shape"):
        joint_kl(problem.old, dist, mask[:5])


def test_the_kit_knows_closures_with_one_kl_per_sample() -> None:
    problem = gaussian(dtype=torch.float32)
    assert check_closure(per_sample(problem), problem.parameters()).passed
