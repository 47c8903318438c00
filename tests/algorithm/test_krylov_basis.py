"""The compact basis of long vectors: as right as it must be, and how a solve with it ends."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from memory import peak_bytes
from solves import N, relative_error, right_side, spd, spoilt, with_eigenvalues
from torch import Tensor

from trpo_optim import long_vectors
from trpo_optim.algorithm import krylov_basis as module
from trpo_optim.algorithm.conjugate_gradient import (
    RELATIVE_DAMPING,
    Ending,
    Solution,
    conjugate_gradient,
)
from trpo_optim.algorithm.krylov_basis import CompactBasis, FullBasis, krylov_basis


@pytest.fixture
def everything_long(monkeypatch: pytest.MonkeyPatch) -> None:
    """Have all vectors count as long, and take them in pieces of seven elements."""
    monkeypatch.setattr(long_vectors, "_LONG", 1)
    for each in (long_vectors, module):
        monkeypatch.setattr(each, "PIECE", 7)


def outlying(top: float, seed: int) -> tuple[Tensor, Tensor]:
    """Return F with a few large eigenvalues along no axis, and b."""
    large = top * torch.tensor([0.08, 0.2, 0.44, 1.0])
    eigenvalues = torch.cat([torch.linspace(0.001, 0.3, 296), large]).double()
    return with_eigenvalues(eigenvalues, seed), right_side(seed, 300)


def along_axes(top: float, seed: int) -> tuple[Tensor, Tensor]:
    """Return F with two large entries of its diagonal, and b that nearly lies along an axis."""
    f, b = with_eigenvalues(torch.logspace(-3, 0, 300).double(), seed), right_side(seed, 300)
    f.diagonal()[:2] += torch.tensor([top, top / 3])
    b[0] = 100.0
    return f, b


def in_double_precision(f: Tensor, b: Tensor, damping: float | None) -> Tensor:
    """Return the tenth iterate for the float32 matrix, from an explicit basis in float64."""
    krylov = (b / b.norm())[:, None]
    for _ in range(9):
        krylov = torch.linalg.qr(torch.cat([krylov, (f @ krylov[:, -1])[:, None]], 1)).Q
    small = krylov.T @ f @ krylov
    if damping is None:
        damping = RELATIVE_DAMPING * float(small.diagonal().mean())
    shifted = small + damping * torch.eye(10, dtype=f.dtype)
    x: Tensor = krylov @ torch.linalg.solve(shifted, krylov.T @ b)
    return x


@pytest.mark.usefixtures("everything_long")
@pytest.mark.parametrize("damping", [None, 1e-3, 0.1])
@pytest.mark.parametrize("top", [25.0, 1e3])
@pytest.mark.parametrize("case", [outlying, along_axes])
@pytest.mark.parametrize("seed", range(3))
def test_half_precision_moves_the_direction_by_less_than_its_own_rounding(
    case: Callable[[float, int], tuple[Tensor, Tensor]],
    top: float,
    damping: float | None,
    seed: int,
) -> None:
    f, b = case(top, seed)
    single = f.float()
    solution = conjugate_gradient(
        single.mv, b.float(), damping=damping, iterations=10, tolerance=0.0
    )
    x, expected = solution.x.double(), in_double_precision(single.double(), b, damping)
    assert relative_error(x / x.norm(), expected / expected.norm()) < 5e-4
    assert solution.curvature == pytest.approx(float(x @ f @ x), rel=1e-3)


def solved(f: Tensor, b: Tensor, *, damping: float = 0.1, iterations: int = 10) -> Solution:
    """Solve in single precision."""
    return conjugate_gradient(
        f.float().mv, b.float(), damping=damping, iterations=iterations, tolerance=0.0
    )


@pytest.mark.usefixtures("everything_long")
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("good_products", [0, 1, 5])
def test_a_product_that_is_not_finite_leaves_the_last_finite_iterate(
    value: float, good_products: int
) -> None:
    f, b = spd(100.0).float(), right_side().float()
    product = spoilt(f, good_products, value)
    solution = conjugate_gradient(product, b, damping=0.1, iterations=10, tolerance=0.0)
    assert solution.ending is Ending.NON_FINITE
    assert (solution.iterations, solution.products) == (good_products, good_products + 1)
    good = solved(f, b, iterations=good_products)
    assert (solution.x - good.x).norm() <= 5e-4 * good.x.norm()


@pytest.mark.usefixtures("everything_long")
def test_curvature_that_turns_negative_leaves_the_last_good_iterate() -> None:
    eigenvalues = torch.linspace(0.5, 3.0, N).double()
    eigenvalues[0] = -1.0
    b = torch.ones(N).double()
    b[0] = 0.1
    f = torch.diag(eigenvalues)
    solution = solved(f, b, damping=0.0)
    assert solution.ending is Ending.NON_POSITIVE_CURVATURE
    assert 1 <= solution.iterations == solution.products - 1
    good = solved(f, b, damping=0.0, iterations=solution.iterations)
    assert good.ending is Ending.ITERATION_LIMIT
    assert relative_error(solution.x, good.x) < 5e-4


@pytest.mark.usefixtures("everything_long")
def test_zero_and_a_single_element_are_solved() -> None:
    f = torch.full((1, 1), 4.0)
    one = solved(f, torch.tensor([-8.0]), damping=0.0)
    assert (one.ending, one.products) == (Ending.CONVERGED, 1)
    torch.testing.assert_close(one.x, torch.tensor([-2.0]))
    none = solved(spd(10.0), torch.zeros(N))
    assert (none.ending, none.products) == (Ending.CONVERGED, 0)
    assert torch.equal(none.x, torch.zeros(N))


@pytest.mark.usefixtures("everything_long")
def test_as_many_iterations_as_distinct_eigenvalues_suffice() -> None:
    eigenvalues = torch.arange(N).double() % 5 + 1.0
    solution = conjugate_gradient(
        with_eigenvalues(eigenvalues).float().mv,
        right_side().float(),
        damping=0.0,
        iterations=10,
        tolerance=1e-4,
    )
    assert (solution.ending, solution.iterations) == (Ending.CONVERGED, 5)


@pytest.mark.usefixtures("everything_long")
def test_solves_leave_b_alone_and_repeat_bit_for_bit() -> None:
    f, b = outlying(25.0, 0)
    single = b.float()
    first, second = solved(f, single), solved(f, single)
    assert torch.equal(first.x, second.x)
    assert torch.equal(single, b.float())


@pytest.mark.usefixtures("everything_long")
def test_autocast_around_the_solve_does_not_reach_it() -> None:
    f, b = spd(1e2).float(), right_side().float()
    plain = solved(f, b)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        cast = conjugate_gradient(
            lambda v: (f * v).sum(1), b, damping=0.1, iterations=10, tolerance=0.0
        )
    torch.testing.assert_close(cast.x, plain.x, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize(
    ("length", "dtype", "kind"),
    [
        (1 << 22, torch.float32, CompactBasis),
        ((1 << 22) - 1, torch.float32, FullBasis),
        (1 << 22, torch.float64, FullBasis),
    ],
)
def test_only_long_vectors_in_single_precision_are_kept_in_half(
    length: int, dtype: torch.dtype, kind: type[object]
) -> None:
    assert type(krylov_basis(torch.ones(length, dtype=dtype), 1)) is kind


def test_a_long_solve_of_ten_products_takes_eight_vectors_and_a_half() -> None:
    n = 1 << 22
    diagonal, b = torch.linspace(0.1, 1.0, n), torch.ones(n)
    peak = peak_bytes(
        lambda: conjugate_gradient(diagonal.mul, b, damping=0.0, iterations=10, tolerance=0.0)
    )
    assert peak < 8.5 * 4 * n  # a full basis: 13
