"""Standardised advantages: over the valid rows, of one process or of all ranks."""

from __future__ import annotations

import math
import re
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from earlier_batches import feedforward_batches
from ranks import Raised, on_ranks, values_of
from test_reuse import taken
from torch import Tensor, nn
from torch.distributions import Distribution, Independent, Normal

from trpo_optim import RankError, TrustRegionError
from trpo_optim.rollouts import Cursor, SinglePathBatch, policy_closure

STEPS, ENVS = 6, 5


def batch_of(valid: Tensor) -> SinglePathBatch:
    """Return a batch whose observations are the numbers of its rows, and whose actions are 1."""
    numbers = torch.arange(valid.numel()).reshape(*valid.shape, 1)
    nothing = torch.zeros_like(valid)
    return SinglePathBatch(
        observations=numbers,
        actions=torch.ones(numbers.shape, dtype=torch.float64),
        rewards=torch.zeros(valid.shape),
        terminated=nothing,
        truncated=nothing,
        starts=nothing,
        valid=valid,
        cut_observations=numbers[0, :0],
        cut_rows=torch.zeros(0, 2, dtype=torch.long),
        state=None,
        episode_returns=[],
        episode_lengths=[],
        end=Cursor(None, None, *map(np.zeros, [ENVS] * 4)),
    )


def used(
    advantages: Tensor, valid: Tensor, *, error: BaseException | None = None, **options: Any
) -> Tensor:
    """Return the advantages that a closure weights the actions of its rows by, (B,)."""
    means = nn.Parameter(torch.zeros(valid.numel(), 1, dtype=torch.float64))

    def policy(rows: Tensor) -> Distribution:
        if error:
            raise error
        return Independent(Normal(means[rows[:, 0]], 1.0), 1)

    built = policy_closure(policy, batch_of(valid), advantages, standardise=True, **options)
    (slopes,) = torch.autograd.grad(built()[0], means)  # d ln π/d mean is 1 at these actions
    return -slopes[valid.reshape(-1), 0] * int(valid.sum())


def rows_of(rank: int, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    """Return a rank's advantages, far from zero, and which rows are valid; the rest is waste."""
    noise = torch.Generator().manual_seed(rank)
    valid = torch.rand(STEPS, ENVS, generator=noise) < 0.3 + 0.2 * rank
    values = 1e3 * (rank + 1) + (rank + 0.5) * torch.randn(valid.shape, generator=noise)
    waste = torch.tensor([math.nan, math.inf, 1e30])[torch.arange(valid.numel()) % 3]
    return torch.where(valid, values, waste.reshape(valid.shape)).to(dtype), valid


def expected(*ranks: tuple[Tensor, Tensor]) -> list[np.ndarray[Any, Any]]:
    """Return what NumPy makes of the valid rows of all ranks together, for each of them."""
    own = [values[valid].double().numpy() for values, valid in ranks]
    every = np.concatenate(own)
    return [(each - every.mean()) / every.std() for each in own]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_valid_rows_get_mean_zero_and_deviation_one(dtype: torch.dtype) -> None:
    rows = rows_of(1, dtype)
    found = used(*rows).numpy()
    np.testing.assert_allclose(found, expected(rows)[0], rtol=1e-6, atol=1e-9)


def test_a_large_mean_takes_no_digits_from_the_deviations() -> None:
    valid = torch.ones(STEPS, ENVS, dtype=torch.bool)
    small = torch.arange(30.0).reshape(STEPS, ENVS).double()
    torch.testing.assert_close(used(small + 1e12, valid), used(small, valid), rtol=1e-9, atol=0)


def test_whole_numbers_are_standardised_too() -> None:
    valid = torch.ones(STEPS, ENVS, dtype=torch.bool)
    whole = torch.arange(30).reshape(STEPS, ENVS)
    assert float(used(whole, valid).square().mean()) == pytest.approx(1, rel=1e-6)


@pytest.mark.parametrize("value", [0.0, 0.1, -1e20])
def test_where_all_are_equal_they_become_zero(value: float) -> None:
    valid = rows_of(2)[1]
    equal = torch.full(valid.shape, value).masked_fill(~valid, 7.0)
    assert not used(equal, valid).any()


def test_advantages_with_a_graph_are_refused_as_ever() -> None:
    values, valid = rows_of(0)
    with pytest.raises(TrustRegionError, match="advantages requires grad"):
        used(values.requires_grad_(), valid)


def test_a_process_group_without_standardising_is_refused() -> None:
    values, valid = rows_of(0)
    group: Any = object()
    with pytest.raises(TrustRegionError, match="standardise is False"):
        policy_closure(nn.Identity(), batch_of(valid), values, process_group=group)


def on_rank(rank: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return what a rank's own rows become, of all kinds: different, equal, equal on each rank."""
    values, valid = rows_of(rank)
    group = dist.group.WORLD
    equal, apart = torch.full_like(values, 0.1), torch.full_like(values, float(rank))
    return (
        used(values, valid, process_group=group),
        used(equal, valid, process_group=group),
        used(apart, valid, process_group=group),
    )


@pytest.mark.ranks
def test_on_several_ranks_mean_and_deviation_are_those_of_all_rows() -> None:
    results = values_of(on_ranks(3, on_rank))
    ranks = [rows_of(rank) for rank in range(3)]
    levels = [(torch.full_like(each[0], rank), each[1]) for rank, each in enumerate(ranks)]
    wanted = zip(results, expected(*ranks), expected(*levels), strict=True)
    for (found, equal, apart), different, by_rank in wanted:
        np.testing.assert_allclose(found.numpy(), different, rtol=1e-9, atol=1e-9)
        assert not equal.any()
        np.testing.assert_allclose(apart.numpy(), by_rank, rtol=1e-9, atol=1e-9)


def stumbling(rank: int, mistake: str) -> tuple[str, str, bool, Tensor]:
    """Fail on rank 1; return what every rank raises, and what it finds when all is well again."""
    values, valid = rows_of(rank)
    bad, kept = values.clone(), valid.clone()
    options: dict[str, Any] = {"curvature": None}
    if rank == 1:
        match mistake:
            case "nothing valid":
                kept[:] = False
            case "NaN":
                bad[valid] = math.nan
            case "shape":
                bad = bad[:-1]
            case "share":
                options["curvature"] = 2.0
            case "bonus":
                options["entropy_bonus"] = math.inf
            case "policy":
                options["error"] = ValueError("a broken policy")
            case "interrupt":
                options["error"] = KeyboardInterrupt("by hand")
    with pytest.raises(BaseException) as caught:  # noqa: PT011 (its kind is looked at by the test)
        used(bad, kept, process_group=dist.group.WORLD, **options)
    lost = bool(getattr(caught.value, "lost", False))
    after = used(values, valid, process_group=dist.group.WORLD)
    return type(caught.value).__name__, str(caught.value), lost, after


@pytest.mark.parametrize(
    ("mistake", "words"),
    [
        ("nothing valid", "no row is valid"),
        ("NaN", "is nan at"),
        ("shape", r"advantages has shape \(5, 5\)"),
        ("share", "curvature is 2.0"),
        ("bonus", "entropy_bonus is inf"),
        ("policy", "a broken policy"),
        ("interrupt", "by hand"),
    ],
)
@pytest.mark.ranks
def test_what_fails_on_one_rank_is_raised_on_all_and_all_may_go_on(
    mistake: str, words: str
) -> None:
    results = values_of(on_ranks(3, stumbling, mistake))
    wanted = expected(*map(rows_of, range(3)))
    for rank, (kind, text, lost, after) in enumerate(results):
        own = {"policy": "ValueError", "interrupt": "KeyboardInterrupt"}.get(mistake)
        assert kind == ((own or "TrustRegionError") if rank == 1 else "RankError")
        told = "" if rank == 1 else r"^policy_closure\(\) failed on another .*: rank 1 raised .*"
        assert re.search(told + words, text)
        assert lost == (mistake == "interrupt" and rank != 1)
        np.testing.assert_allclose(after.numpy(), wanted[rank], rtol=1e-9, atol=1e-9)


def deserting(rank: int) -> Tensor:
    values, valid = rows_of(rank)
    if rank == 1:
        raise SystemExit
    return used(values, valid, process_group=dist.group.WORLD)


@pytest.mark.ranks
def test_a_rank_that_does_not_come_is_an_error_on_the_others() -> None:
    found, gone = on_ranks(2, deserting, timeout=3.0)
    assert isinstance(found, Raised)
    assert found.kind == "RankError"
    assert "did not make the same calls of step() and policy_closure()" in found.text
    assert gone.kind == "SystemExit"


def mistaken(rank: int) -> str:
    """Make a mistake on rank 0 while the other rank is gone; return the cause that is named."""
    values, valid = rows_of(rank)
    if rank == 1:
        raise SystemExit
    with pytest.raises(RankError) as caught:
        used(values[:-1], valid, process_group=dist.group.WORLD)
    return str(caught.value.__cause__)


@pytest.mark.ranks
def test_a_rank_that_raises_while_another_is_gone_says_what_it_raised() -> None:
    (found, gone) = on_ranks(2, mistaken, timeout=3.0)
    assert gone.kind == "SystemExit"
    assert "advantages has shape (5, 5)" in found


@pytest.mark.parametrize("shares", [(1.0, 0.5, 0.25), (0.5, 0.25, 0.25)])
@pytest.mark.parametrize("options", [{}, {"curvature": 0.9}, {"standardise": True}])
def test_whole_numbers_are_advantages_like_others(shares: Any, options: Any) -> None:
    policy, parts, advantages = feedforward_batches("cpu")
    whole = [(10 * each.nan_to_num()).long() for each in advantages]
    found = []
    for given in (whole, [each.float() for each in whole]):
        torch.manual_seed(0)
        built = policy_closure(policy, parts, given, batch_weights=shares, **options)
        found.append(taken((policy, parts, given), built)[0])
    torch.testing.assert_close(*found)
