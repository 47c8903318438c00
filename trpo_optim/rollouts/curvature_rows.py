"""Which rows of a batch Fisher-vector products are taken on."""

from __future__ import annotations

import math
from typing import Literal, TypeAlias

import torch
from torch import Tensor

from trpo_optim.errors import TrustRegionError

__all__ = ["CurvatureShare", "curvature_rows", "enough_rows"]

CurvatureShare: TypeAlias = float | Literal["auto"] | None
"""A share of the rows, as many as are enough, or all of them."""

LEAST = 2048


def enough_rows(rows: int) -> int:
    """Return how many rows of a batch are enough for Fisher-vector products.

    These are all rows up to 2048, and then 2048 or a tenth, whichever is more.

    Args:
        rows: Of the whole batch.
    """
    return min(rows, max(LEAST, rows // 10))


def curvature_rows(
    curvature: CurvatureShare,
    pieces: int,
    generator: torch.Generator | None,
    *,
    rows: int,
    most: int | None = None,
) -> Tensor | None:
    """Draw the pieces of a batch that Fisher-vector products are taken on.

    ``"auto"`` never touches torch's global generator. It draws by a generator of a fixed seed if
    none is given, and draws nothing if it takes all pieces.

    Args:
        curvature: The share of the pieces, in (0, 1). ``"auto"``: as many as hold
            ``enough_rows(rows)`` rows. None: all.
        pieces: How many there are.
        generator: The generator that draws. None: torch's global one for a share.
        rows: How many rows the pieces have together.
        most: The most pieces that may be evaluated at once. If ``"auto"`` needs more, it takes all,
            which the caller evaluates one after the other.

    Returns:
        Their indices, in order, at least one; None for all.

    Raises:
        TrustRegionError: If ``curvature`` is something else.
    """
    if curvature is None:
        return None
    if curvature == "auto":
        taken = math.ceil(enough_rows(rows) * pieces / max(1, rows))
        if taken >= min(pieces, (most or pieces) + 1):
            return None
        generator = generator or torch.Generator().manual_seed(0)
    elif isinstance(curvature, str) or not 0 < curvature < 1:
        raise TrustRegionError(
            f"curvature is {curvature!r}; it must be 'auto', a share in (0, 1), or None for all "
            "rows."
        )
    else:
        taken = max(1, round(curvature * pieces))
    return torch.randperm(pieces, generator=generator)[:taken].sort().values
