"""Sums over long vectors are those of double precision."""

from __future__ import annotations

import pytest
import torch

from trpo_optim.long_vectors import PIECE, dot, norm


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
