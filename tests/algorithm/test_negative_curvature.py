"""Conjugate gradient where F does not curve upwards: the last iterate that does is the answer."""

from __future__ import annotations

import pytest
import torch
from solves import N, relative_error, right_side, solve, true_residual
from torch import Tensor

from trpo_optim.algorithm.conjugate_gradient import (
    RELATIVE_DAMPING,
    Ending,
    conjugate_gradient,
)


def test_curvature_that_is_not_positive_at_once_leaves_zero() -> None:
    for f in (-torch.eye(N).double(), torch.zeros(N, N).double()):
        solution = solve(f, right_side())
        assert solution.ending is Ending.NON_POSITIVE_CURVATURE
        assert torch.equal(solution.x, torch.zeros(N).double())
        assert (solution.iterations, solution.products, solution.residual) == (0, 1, 1.0)


def indefinite() -> tuple[Tensor, Tensor]:
    """A matrix with one negative eigenvalue, which b touches too little to be seen at once."""
    b = torch.ones(4, dtype=torch.float64)
    b[3] = 0.1
    return torch.diag(torch.tensor([1.0, 2.0, 3.0, -1.0], dtype=torch.float64)), b


def test_curvature_that_turns_negative_later_leaves_the_last_good_iterate() -> None:
    f, b = indefinite()
    solution = solve(f, b)
    good = solve(f, b, iterations=solution.iterations, tolerance=0.0)
    assert solution.ending is Ending.NON_POSITIVE_CURVATURE
    assert solution.iterations >= 1
    assert solution.products == solution.iterations + 1
    assert good.ending is Ending.ITERATION_LIMIT
    assert torch.equal(solution.x, good.x)
    assert solution.curvature == pytest.approx(float(good.x @ f @ good.x), rel=1e-12)
    assert solution.residual == pytest.approx(true_residual(f, b, good.x), rel=1e-12)


@pytest.mark.parametrize("damping", [None, 0.0, 0.02, 0.1])
@pytest.mark.parametrize("least", [-0.5, -0.05, -0.02, -0.005])
def test_damping_that_hides_a_negative_curvature_leaves_the_last_iterate_that_curves_upwards(
    least: float, damping: float | None
) -> None:
    f = torch.diag(torch.tensor([1.0, least], dtype=torch.float64))
    b = torch.tensor([1.0, 0.3], dtype=torch.float64)
    solution = conjugate_gradient(f.mv, b, damping=damping, iterations=10, tolerance=1e-10)
    second = RELATIVE_DAMPING * float(f.trace()) / 2 if damping is None else damping
    expected = b / (f.diagonal() + second)
    upwards = second + least > 0 and float(expected @ f @ expected) > 0
    if not upwards:  # the minimum along b alone
        expected = b.dot(b) / (b @ f @ b + solution.damping * b.dot(b)) * b
    assert solution.ending is (Ending.CONVERGED if upwards else Ending.NON_POSITIVE_CURVATURE)
    torch.testing.assert_close(solution.x, expected)
    assert solution.curvature == pytest.approx(float(expected @ f @ expected), rel=1e-12)
    assert solution.curvature > 0


def test_damping_makes_a_slightly_indefinite_matrix_solvable() -> None:
    f, b = indefinite()
    expected = torch.linalg.solve(f + 1.5 * torch.eye(4).double(), b)
    assert relative_error(solve(f, b, damping=1.5).x, expected) < 1e-9
