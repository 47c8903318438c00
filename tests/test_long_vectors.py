"""Sums over long vectors are those of double precision."""

from __future__ import annotations

import math
from contextlib import AbstractContextManager
from typing import Any

import pytest
import torch

from trpo_optim import long_vectors
from trpo_optim.long_vectors import PIECE, dot, in_parts, largest, length, norm


@pytest.mark.parametrize("n", [1, 1000, 1 << 22, (1 << 23) + 1])
def test_norm_and_scalar_product_are_those_of_double_precision(n: int) -> None:
    vector = torch.arange(n).sin().mul_(3.0).add_(1.0)
    other = vector.flip(0)
    double = vector.double()
    assert float(norm(vector)) == pytest.approx(float(double.norm()), rel=1e-5)
    assert float(dot(vector, other)) == pytest.approx(float(double.dot(other.double())), rel=1e-5)


def test_a_short_vector_has_the_norm_and_product_of_torch_bit_for_bit() -> None:
    generator = torch.Generator().manual_seed(0)
    for n in (3, 17, 4096, PIECE + 1):
        vector = torch.randn(n, generator=generator)
        assert torch.equal(norm(vector), vector.norm())
        assert torch.equal(dot(vector, vector), vector.dot(vector))


@pytest.mark.parametrize("size", [7, 3 * PIECE + 1])
def test_sums_over_parts_are_those_over_the_whole(size: int, monkeypatch: Any) -> None:
    monkeypatch.setattr(long_vectors, "_LONG", 1000)
    torch.manual_seed(0)
    one, other = torch.randn(size), torch.randn(size)
    own, rest = slice(0, size // 3), slice(size // 3, size)
    sums = {
        "norm": one[rest].double().square().sum(),
        "dot": one[rest].double().dot(other[rest].double()),
    }
    peak = float(one[rest].abs().max())

    def with_the_rest(name: str) -> AbstractContextManager[None]:
        return in_parts(lambda total: total.add_(sums[name]), lambda own: [own, peak], size)

    with with_the_rest("norm"):
        assert float(norm(one[own])) == pytest.approx(float(one.double().norm()), rel=1e-6)
        assert largest(one[own]) == float(one.abs().max())
        assert length(one[own]) == size
    with with_the_rest("dot"):
        expected = float(one.double().dot(other.double()))
        assert float(dot(one[own], other[own])) == pytest.approx(expected, rel=1e-5, abs=1e-3)
    assert length(one[own]) == len(one[own])


def test_a_number_that_is_none_on_one_rank_is_the_largest_of_all() -> None:
    with in_parts(lambda total: None, lambda own: [own, float("nan")], 4):
        assert math.isnan(largest(torch.ones(2)))
        assert math.isnan(largest(torch.ones(0)))
