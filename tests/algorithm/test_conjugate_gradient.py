"""Conjugate gradient against dense float64 solves, its endings, and the faults of its kind."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from solves import (
    N,
    relative_error,
    right_side,
    solve,
    spd,
    spoilt,
    true_residual,
    with_eigenvalues,
)
from torch import Tensor

from trpo_optim.algorithm.conjugate_gradient import (
    RELATIVE_DAMPING,
    Ending,
    conjugate_gradient,
)


@pytest.mark.parametrize("damping", [0.0, 1e-3, 0.1, 10.0])
@pytest.mark.parametrize("condition", [2.0, 1e2, 1e4])
@pytest.mark.parametrize("seed", [0, 1])
def test_solution_is_that_of_a_dense_solve(damping: float, condition: float, seed: int) -> None:
    f, b = spd(condition, seed), right_side(seed=seed + 10)
    solution = solve(f, b, damping=damping, iterations=500, tolerance=1e-12)
    expected = torch.linalg.solve(f + damping * torch.eye(N, dtype=f.dtype), b)
    assert solution.ending is Ending.CONVERGED
    assert relative_error(solution.x, expected) < 1e-12 * condition


@pytest.mark.parametrize("iterations", [1, 3, 10, 25])
def test_reported_residual_and_curvature_are_the_true_ones(iterations: int) -> None:
    f, b = spd(100.0), right_side()
    solution = solve(f, b, damping=0.05, iterations=iterations, tolerance=0.0)
    x = solution.x
    assert solution.residual == pytest.approx(true_residual(f, b, x, 0.05), rel=1e-6, abs=1e-14)
    assert solution.curvature == pytest.approx(float(x @ f @ x), rel=1e-12)


@pytest.mark.parametrize("size", [0.0, 1e-3, 0.1])
def test_products_that_are_not_symmetric_are_measured(size: float) -> None:
    f, b = spd(100.0), right_side()
    skew = size * torch.randn(N, N, generator=torch.Generator().manual_seed(3), dtype=f.dtype)
    solution = solve(f + skew - skew.T, b, damping=0.1, iterations=2, tolerance=0.0)
    p = b / b.norm()
    rest = (f + skew - skew.T) @ p
    q = rest - p * (p @ rest)
    q /= q.norm()
    entries = torch.stack([p, q]) @ (f + skew - skew.T) @ torch.stack([p, q]).T
    rest = (f + skew - skew.T) @ q
    below = (rest - p * (p @ rest) - q * (q @ rest)).norm()
    largest = max(*entries.diagonal().abs().tolist(), float(entries[1, 0]), float(below))
    expected = abs(float(entries[0, 1] - entries[1, 0])) / largest
    assert solution.asymmetry == pytest.approx(expected, rel=1e-9, abs=1e-13)


@pytest.mark.parametrize("iterations", [1, 4, 9])
def test_the_limit_ends_the_solve_after_one_product_an_iteration(iterations: int) -> None:
    f, calls = spd(1e4), list[Tensor]()

    def product(vector: Tensor) -> Tensor:
        calls.append(vector)
        return f.mv(vector)

    solution = conjugate_gradient(
        product, right_side(), damping=0.0, iterations=iterations, tolerance=1e-10
    )
    assert solution.ending is Ending.ITERATION_LIMIT
    assert solution.iterations == solution.products == len(calls) == iterations
    assert solution.residual > 1e-10


@pytest.mark.parametrize("tolerance", [0.3, 1e-2, 1e-5])
def test_the_solve_stops_at_the_first_iterate_within_the_tolerance(tolerance: float) -> None:
    f, b = spd(1e3), right_side()
    solution = solve(f, b, tolerance=tolerance)
    earlier = solve(f, b, tolerance=0.0, iterations=solution.iterations - 1)
    assert solution.ending is Ending.CONVERGED
    assert true_residual(f, b, solution.x) <= tolerance * (1 + 1e-9)
    assert true_residual(f, b, earlier.x) > tolerance


@pytest.mark.parametrize("distinct", [1, 2, 5])
def test_as_many_iterations_as_distinct_eigenvalues_suffice(distinct: int) -> None:
    eigenvalues = torch.arange(N, dtype=torch.float64) % distinct + 1.0
    solution = solve(with_eigenvalues(eigenvalues), right_side(), tolerance=1e-12)
    assert solution.ending is Ending.CONVERGED
    assert solution.iterations == distinct


@pytest.mark.parametrize("damping", [0.0, 0.1])
def test_zero_right_side_gives_zero_without_a_product(damping: float) -> None:
    solution = solve(spd(10.0), torch.zeros(N).double(), damping=damping)
    assert solution.ending is Ending.CONVERGED
    assert torch.equal(solution.x, torch.zeros(N).double())
    assert (solution.iterations, solution.products) == (0, 0)
    assert (solution.residual, solution.curvature) == (0.0, 0.0)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("good_products", [0, 1, 3])
def test_a_product_that_is_not_finite_leaves_the_last_finite_iterate(
    value: float, good_products: int
) -> None:
    f, b = spd(100.0), right_side()
    product = spoilt(f, good_products, value)
    solution = conjugate_gradient(product, b, damping=0.1, iterations=10, tolerance=0.0)
    good = solve(f, b, damping=0.1, iterations=good_products, tolerance=0.0)
    assert solution.ending is Ending.NON_FINITE
    assert (solution.iterations, solution.products) == (good_products, good_products + 1)
    assert torch.equal(solution.x, good.x)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_a_right_side_that_is_not_finite_ends_as_such_and_leaves_zero(value: float) -> None:
    b = right_side()
    b[N // 2] = value
    solution = solve(spd(10.0), b, damping=0.1)
    assert solution.ending is Ending.NON_FINITE
    assert torch.equal(solution.x, torch.zeros(N).double())
    assert solution.iterations == 0
    assert math.isnan(solution.residual)


def test_ten_iterations_solve_for_ten_distinct_eigenvalues_and_leave_b_alone() -> None:
    # Fault: direction and residual in one storage, while the residual is updated in place.
    f = with_eigenvalues(torch.arange(N, dtype=torch.float64) % 10 + 1.0)
    b = right_side()
    kept = b.clone()
    solution = solve(f, b, iterations=10, tolerance=0.0)
    assert solution.iterations == 10
    assert true_residual(f, b, solution.x) < 1e-10
    assert torch.equal(b, kept)


@pytest.mark.parametrize("scale", [1.0, 1e-5])
def test_one_iteration_is_the_exact_minimum_along_b_and_draws_no_random_number(
    scale: float,
) -> None:
    # Fault: a random start, which drowns a small right-hand side.
    f, b = spd(100.0), scale * right_side()
    random_state = torch.get_rng_state()
    first, second = (solve(f, b, iterations=1, tolerance=0.0).x for _ in range(2))
    assert torch.equal(first, second)
    assert torch.equal(torch.get_rng_state(), random_state)
    assert relative_error(first, b.dot(b) / (b @ f @ b) * b) < 1e-14


@pytest.mark.parametrize("scale", [1e-20, 1e-5, 1e5, 1e20])
def test_the_scale_of_b_changes_neither_iterations_nor_direction(scale: float) -> None:
    # Faults: an absolute tolerance, and an epsilon added to the denominators.
    f, b = spd(10.0), right_side()
    reference = solve(f, b, damping=0.1, tolerance=1e-6)
    scaled = solve(f, scale * b, damping=0.1, tolerance=1e-6)
    assert scaled.ending is reference.ending is Ending.CONVERGED
    assert scaled.iterations == reference.iterations > 5
    assert relative_error(scaled.x / scale, reference.x) < 1e-10
    assert scaled.residual == pytest.approx(reference.residual, rel=1e-4)


@pytest.mark.parametrize("scale", [1e-12, 1e-6, 1.0, 1e6])
def test_the_scale_of_the_matrix_changes_no_direction(scale: float) -> None:
    # Fault: an epsilon added to the denominators shortens every step where F is flat.
    f, b = spd(100.0), right_side()
    reference = solve(f, b, iterations=8, tolerance=0.0)
    scaled = solve(scale * f, b, iterations=8, tolerance=0.0)
    assert relative_error(scaled.x * scale, reference.x) < 1e-10


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_solution_keeps_the_dtype_of_b(dtype: torch.dtype) -> None:
    f: Callable[[Tensor], Tensor] = spd(10.0).to(dtype).mv
    solution = conjugate_gradient(
        f, right_side().to(dtype), damping=0.1, iterations=10, tolerance=1e-3
    )
    assert solution.x.dtype is dtype


@pytest.mark.parametrize("seed", range(5))
def test_single_precision_reaches_what_double_precision_reaches_in_as_many_steps(
    seed: int,
) -> None:
    """Outlying eigenvalues make the textbook's residuals lose their orthogonality in float32."""
    eigenvalues = torch.cat([torch.linspace(0.001, 0.3, N - 4), torch.tensor([2, 5, 11, 25])])
    f, b = with_eigenvalues(eigenvalues.double(), seed), right_side(seed)
    krylov = b[:, None]
    for _ in range(9):  # an orthonormal basis of b, Fb, F²b, ...
        krylov = torch.linalg.qr(torch.cat([krylov, (f @ krylov[:, -1])[:, None]], 1)).Q
    projected = krylov.T @ f @ krylov + 1e-3 * torch.eye(10, dtype=f.dtype)
    expected = krylov @ torch.linalg.solve(projected, krylov.T @ b)
    single = f.float()
    solution = conjugate_gradient(single.mv, b.float(), damping=1e-3, iterations=10, tolerance=0.0)
    assert relative_error(solution.x.double(), expected) < 1e-4  # the textbook's: 0.2 to 0.5


@pytest.mark.parametrize("iterations", [1, 3, 10])
def test_damping_left_to_the_solve_is_a_share_of_the_mean_curvature_it_met(
    iterations: int,
) -> None:
    f, b = spd(1e3), right_side()
    krylov = b[:, None]
    for _ in range(iterations - 1):
        krylov = torch.linalg.qr(torch.cat([krylov, (f @ krylov[:, -1])[:, None]], 1)).Q
    damping = RELATIVE_DAMPING * float((krylov.T @ f @ krylov).diagonal().mean())
    solution = conjugate_gradient(f.mv, b, damping=None, iterations=iterations, tolerance=0.0)
    assert solution.damping == pytest.approx(damping)
    fixed = solve(f, b, damping=damping, iterations=iterations, tolerance=0.0)
    torch.testing.assert_close(solution.x, fixed.x)
    assert solution.residual == pytest.approx(true_residual(f, b, solution.x, damping))


@pytest.mark.parametrize("scale", [1e-8, 1e8])
def test_damping_left_to_the_solve_follows_the_scale_of_f(scale: float) -> None:
    f, b = spd(1e3), right_side()
    one, other = (
        conjugate_gradient(each.mv, b, damping=None, iterations=8, tolerance=0.0)
        for each in (f, scale * f)
    )
    torch.testing.assert_close(scale * other.x, one.x)


def test_autocast_around_the_solve_does_not_reach_it() -> None:
    f, b = spd(1e2).float(), right_side().float()
    plain = conjugate_gradient(f.mv, b, damping=0.1, iterations=10, tolerance=0.0)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        cast = conjugate_gradient(
            lambda v: (f * v).sum(1), b, damping=0.1, iterations=10, tolerance=0.0
        )
    torch.testing.assert_close(cast.x, plain.x, rtol=1e-4, atol=1e-6)
