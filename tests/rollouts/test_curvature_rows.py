"""Which rows Fisher-vector products are taken on, by default and by choice."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from lakes import Swing, pendulums
from pendulum_batches import Gaussian, feedforward, pendulum, vector_of
from test_recurrent_closures import recurrent
from torch import Tensor

from trpo_optim import TrustRegionError, TrustRegionOptimizer
from trpo_optim.rollouts import SinglePathBatch, policy_closure, single_path, vine, vine_closure
from trpo_optim.rollouts.curvature_rows import curvature_rows, enough_rows

ENOUGH_OF_5000 = 2252


def drawn(curvature: Any, count: int, **options: Any) -> int | None:
    """How many rows are taken."""
    found = curvature_rows(curvature, count, None, **options)
    return None if found is None else len(found)


@pytest.fixture(scope="module")
def large() -> tuple[Gaussian, SinglePathBatch, Tensor]:
    """More rows than products need."""
    torch.manual_seed(0)
    policy = Gaussian()
    batch = single_path(pendulum(), policy, steps=600, seed=0)
    assert batch.valid.sum() > 2000
    return policy, batch, torch.randn(600, 4)


@pytest.mark.parametrize(
    ("rows", "enough"),
    [
        *((rows, rows) for rows in (0, 1, 64, 1023)),
        *((1024, 819), (2048, 1365), (8192, 2731), (20_480, 3413)),
        *((36_864, 3686), (65_536, 6553), (10**6, 10**5)),
    ],
)
def test_enough_rows_are_all_of_a_small_batch_and_a_tenth_of_a_large_one(
    rows: int, enough: int
) -> None:
    assert enough_rows(rows) == enough
    assert drawn("auto", rows) == (enough if enough < rows else None)


def test_micro_batches_stay_the_most_that_auto_evaluates_at_once() -> None:
    assert drawn("auto", 5000, most=2252) == ENOUGH_OF_5000
    assert drawn("auto", 5000, most=2251) is None
    assert drawn(0.5, 5000, most=100) == 2500


def test_auto_draws_the_same_rows_again_and_from_no_global_state() -> None:
    before = torch.get_rng_state()
    first, second = (curvature_rows("auto", 5000, None) for _ in range(2))
    assert torch.equal(torch.get_rng_state(), before)
    assert first is not None
    assert second is not None
    assert torch.equal(first, second)
    assert len(first.unique()) == ENOUGH_OF_5000
    assert len((first % 8).bincount()) == 8  # of eight environments side by side, rows of each
    assert (first % 8).bincount().min() > 0.8 * ENOUGH_OF_5000 / 8


def test_auto_draws_from_the_generator_that_is_given() -> None:
    noise = torch.Generator().manual_seed(3)
    found = curvature_rows("auto", 5000, noise)
    expected = torch.randperm(5000, generator=torch.Generator().manual_seed(3))[:ENOUGH_OF_5000]
    assert found is not None
    assert torch.equal(found, expected.sort().values)
    before = noise.get_state()
    assert curvature_rows("auto", 100, noise) is None
    assert torch.equal(noise.get_state(), before)


@pytest.mark.parametrize("curvature", ["all", "", 0, 1.0, -0.1, 2, True, float("nan")])
def test_what_is_no_share_is_refused(curvature: Any) -> None:
    policy, batch, advantages = feedforward()
    said = rf"curvature is {curvature!r}; it must be 'auto', a share in \(0, 1\), or None"
    with pytest.raises(TrustRegionError, match=said):
        policy_closure(policy, batch, advantages, curvature=curvature)


def test_by_default_a_small_batch_gives_the_step_of_all_its_rows() -> None:
    found = []
    options: dict[str, Any]
    for options in ({}, {"curvature": "auto"}, {"curvature": None}):
        policy, batch, advantages = feedforward()
        before = torch.get_rng_state()
        built = policy_closure(policy, batch, advantages, **options)
        assert torch.equal(torch.get_rng_state(), before)
        assert built.curvature is None
        assert TrustRegionOptimizer(policy.parameters()).step(built).accepted
        found.append(vector_of(policy))
    assert torch.equal(found[0], found[2])
    assert torch.equal(found[1], found[2])


def test_by_default_a_large_batch_gives_products_on_enough_rows(
    large: tuple[Gaussian, SinglePathBatch, Tensor],
) -> None:
    policy, batch, advantages = large
    start, found = vector_of(policy), []
    options: dict[str, Any]
    for options in ({}, {"micro_batch": 2048}, {"curvature": None}):
        torch.nn.utils.vector_to_parameters(start.clone(), policy.parameters())
        before = torch.get_rng_state()
        built = policy_closure(policy, batch, advantages, **options)
        assert torch.equal(torch.get_rng_state(), before)
        assert (built.curvature is None) == ("curvature" in options)
        if built.curvature is not None:
            assert built.curvature()[1].shape == (enough_rows(int(batch.valid.sum())),)
        report = TrustRegionOptimizer(policy.parameters()).step(built)
        assert report.accepted
        assert report.kl <= 0.01
        found.append(vector_of(policy) - start)
    torch.testing.assert_close(found[0], found[1], rtol=1e-3, atol=1e-5)
    assert not torch.equal(found[0], found[2])
    assert torch.cosine_similarity(found[0], found[2], dim=0) > 0.98


def test_by_default_recurrent_and_sampled_products_take_all_rows(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("trpo_optim.rollouts.curvature_rows._MOST", 20)
    assert policy_closure(*feedforward()).curvature is not None
    assert policy_closure(*feedforward(), sampled=True).curvature is None
    assert policy_closure(*recurrent()).curvature is None
    assert policy_closure(*recurrent(), curvature=0.5).curvature is not None


def test_by_default_a_vines_products_take_enough_states_of_the_trunk(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    policy, envs = Swing(), pendulums()
    batch = vine(envs, policy, steps=25, states=20, branches=4, horizon=10, gamma=0.97, seed=0)
    assert vine_closure(policy, batch).curvature is None
    monkeypatch.setattr("trpo_optim.rollouts.curvature_rows._MOST", 150)
    before = torch.get_rng_state()
    built = vine_closure(policy, batch)
    assert torch.equal(torch.get_rng_state(), before)
    assert built.curvature is not None
    assert built.curvature()[1].shape == (enough_rows(int(batch.trunk.valid.sum())),)
    assert TrustRegionOptimizer(policy.parameters()).step(built).accepted
    with pytest.raises(TrustRegionError, match="curvature is 'none'; it must be 'auto'"):
        vine_closure(policy, batch, curvature="none")  # type: ignore[arg-type]  # the mistake
