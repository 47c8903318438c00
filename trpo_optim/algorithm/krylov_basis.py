"""The orthonormal basis of b, Fb, F²b, … that a solve goes through, in little memory."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from trpo_optim.long_vectors import PIECE, is_long, length, norm, total

__all__ = ["CompactBasis", "FullBasis", "krylov_basis"]

_AT_FIRST = 32
"""For how many vectors a full basis has memory at first, unless twice as many are all it needs."""

_LARGEST_SCALE = 2.0**15
"""Half precision holds numbers up to 65504, and a unit vector's element may be 1."""


def krylov_basis(b: Tensor, size: int) -> FullBasis | CompactBasis:
    """Return an empty basis, compact where b is long and in single precision.

    Args:
        b: What the first vector is made of, shape (n,).
        size: The most vectors.
    """
    compact = is_long(b) and b.dtype is torch.float32
    return CompactBasis(b) if compact else FullBasis(b, size)


class FullBasis:
    """A basis with all vectors in the precision of b.

    Args:
        b: What the first vector is made of, shape (n,); not modified.
        size: The most vectors.

    Attributes:
        rest_length: The length of what the next vector is made of: of b, or of what lies beyond the
            basis.
    """

    def __init__(self, b: Tensor, size: int) -> None:
        first = size if size <= 2 * _AT_FIRST else _AT_FIRST
        self._vectors = b.new_empty(first, len(b))
        self._size, self._count = size, 0
        self._rest = b
        self.rest_length = float(norm(b))

    def extend(self) -> Tensor:
        """Return the next vector, of length 1, which is now one of the basis."""
        if self._count == len(self._vectors):  # most solves end before
            more = min(self._count, self._size - self._count)
            self._vectors = torch.cat(
                [self._vectors, self._vectors.new_empty(more, len(self._rest))]
            )
        vector = torch.div(self._rest, self.rest_length, out=self._vectors[self._count])
        self._rest = vector  # lets go of what it was made of
        self._count += 1
        return vector

    def absorb(self, image: Tensor) -> tuple[float, float]:
        """Keep what lies beyond the basis, for the next vector.

        Args:
            image: The product Fq with the last vector q, shape (n,); not modified.

        Returns:
            qᵀFq, and pᵀFq with the vector p before q, or 0 if q is the first.
        """
        known = self._vectors[: self._count]
        with torch.autocast(image.device.type, enabled=False):
            components = total(known @ image)
            self._rest = image - known.T @ components
            left = total(known @ self._rest)  # what rounding left of the components
            self._rest -= known.T @ left
            *back, bend, self.rest_length = torch.cat(
                [components[-2:], norm(self._rest)[None]]
            ).tolist()
        return bend, sum(back)

    def combined(self, y: Sequence[float]) -> Tensor:
        """Return the sum of y times the first vectors, shape (n,); the basis ends.

        Args:
            y: One number per vector.
        """
        with torch.autocast(self._vectors.device.type, enabled=False):
            return self._vectors[: len(y)].T @ self._vectors.new_tensor(y)


class CompactBasis:
    """A basis in half the memory of a ``FullBasis``, for long vectors.

    The last two vectors are in full precision: the next vector is the small rest of a product
    without their components, so that an error in them would be large beside it. The first vector is
    b itself. All others are in half precision, scaled so that their elements are about 1. That
    moves each by at most 5e-4 of its length. Every further vector is made orthogonal to what they
    have become. Then the error of T = qᵀFq is of second order.

    Bfloat16 for the same memory loses 0.8 % of xᵀFx on CartPole, and the cosine of the direction is
    0.99 where F has outliers of 10⁶. A basis that is made orthogonal to its last two vectors alone
    needs as much memory as a full one while λ is left to the solve; its cosine is 0.97 on CartPole.

    Args:
        b: What the first vector is made of, shape (n,); not modified.

    Attributes:
        rest_length: As of ``FullBasis``.

    Source:
        Simon, "Analysis of the symmetric Lanczos algorithm with reorthogonalization methods"
        (1984), for what a basis that is only nearly orthogonal does to T.
    """

    def __init__(self, b: Tensor) -> None:
        self._b = b
        self._rest = b.clone()
        self._vectors: list[Tensor] = []
        self._factors: list[float] = []  # by which each is to be multiplied
        self.rest_length = self._length = float(norm(b))

    def extend(self) -> Tensor:
        """Return the next vector, of length 1, which is now one of the basis."""
        earlier = len(self._vectors) - 2
        if earlier == 0:
            self._vectors[0], self._factors[0] = self._b, 1 / self._length
        elif earlier > 0:
            scale = min(math.sqrt(length(self._b)), _LARGEST_SCALE)
            self._vectors[earlier] = _in_half_precision(self._vectors[earlier], scale)
            self._factors[earlier] = 1 / scale
        self._vectors.append(self._rest.div_(self.rest_length))
        self._factors.append(1.0)
        return self._rest

    def absorb(self, image: Tensor) -> tuple[float, float]:
        """Keep what lies beyond the basis, for the next vector.

        Args:
            image: The product Fq with the last vector q, shape (n,); not modified.

        Returns:
            qᵀFq, and pᵀFq with the vector p before q, or 0 if q is the first.
        """
        self._rest = image.clone()
        factors = image.new_tensor(self._factors)
        with torch.autocast(image.device.type, enabled=False):
            components = left = factors * self._taken_off(torch.zeros_like(factors))
            for _ in range(2):  # then again, what rounding left of the components
                left = factors * self._taken_off(factors * left)
            *back, bend, self.rest_length = torch.cat(
                [components[-2:], norm(self._rest)[None]]
            ).tolist()
        return bend, sum(back)

    def combined(self, y: Sequence[float]) -> Tensor:
        """Return the sum of y times the first vectors, shape (n,); the basis ends.

        Args:
            y: One number per vector.
        """
        x = self._rest  # in the memory of what no further vector is made of
        weights = x.new_tensor([a * factor for a, factor in zip(y, self._factors, strict=False)])
        with torch.autocast(x.device.type, enabled=False):
            for known, part in self._pieces(x):
                part.copy_(known[: len(y)].T @ weights)
        return x

    def _taken_off(self, components: Tensor) -> Tensor:
        """Take components off the rest, in place; return those that are left."""
        left = [torch.zeros_like(components)]
        for known, part in self._pieces(self._rest):
            part.addmv_(known.T, components, alpha=-1)
            left.append(known @ part)
        return total(torch.stack(left).sum(0))

    def _pieces(self, vector: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield the pieces of all vectors, as they are kept, with those of another vector."""
        room = vector.new_empty(len(self._vectors), min(PIECE, len(vector)))
        for start in range(0, len(vector), PIECE):
            part = vector[start : start + PIECE]
            known = room[:, : len(part)]
            for row, each in zip(known, self._vectors, strict=True):
                row.copy_(each[start : start + PIECE])
            yield known, part


def _in_half_precision(vector: Tensor, scale: float) -> Tensor:
    half = torch.empty_like(vector, dtype=torch.float16)
    for target, source in zip(half.split(PIECE), vector.split(PIECE), strict=True):
        target.copy_(source * scale)
    return half
