"""Matrices with known eigenvalues, solves with them, and how far a solution is off."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from trpo_optim.algorithm.conjugate_gradient import Solution, conjugate_gradient

N = 30


def with_eigenvalues(eigenvalues: Tensor, seed: int = 0) -> Tensor:
    n, generator = len(eigenvalues), torch.Generator().manual_seed(seed)
    q = torch.linalg.qr(torch.randn(n, n, generator=generator, dtype=torch.float64)).Q
    matrix: Tensor = (q * eigenvalues) @ q.T
    return matrix


def spd(condition: float, seed: int = 0) -> Tensor:
    return with_eigenvalues(torch.logspace(-math.log10(condition), 0, N).double(), seed)


def spoilt(f: Tensor, good_products: int, value: float) -> Callable[[Tensor], Tensor]:
    """Return a product with f that holds a value in its middle after so many good ones."""
    made = 0

    def product(vector: Tensor) -> Tensor:
        nonlocal made
        made += 1
        result = f.mv(vector)
        if made > good_products:
            result[len(f) // 2] = value
        return result

    return product


def right_side(seed: int = 1, n: int = N) -> Tensor:
    b = torch.randn(n, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    unit: Tensor = b / b.norm()
    return unit


def solve(
    f: Tensor,
    b: Tensor,
    *,
    damping: float = 0.0,
    iterations: int = 200,
    tolerance: float = 1e-10,
) -> Solution:
    return conjugate_gradient(f.mv, b, damping=damping, iterations=iterations, tolerance=tolerance)


def true_residual(f: Tensor, b: Tensor, x: Tensor, damping: float = 0.0) -> float:
    return float((b - f.mv(x) - damping * x).norm() / b.norm())


def relative_error(x: Tensor, expected: Tensor) -> float:
    return float((x - expected).norm() / expected.norm())
