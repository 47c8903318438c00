"""Which rows of a batch Fisher-vector products are taken on."""

from __future__ import annotations

from typing import Literal, TypeAlias

import torch
from torch import Tensor

from trpo_optim.errors import TrustRegionError

__all__ = ["CurvatureShare", "curvature_rows", "enough_rows"]

CurvatureShare: TypeAlias = float | Literal["auto"] | None
"""A share of the rows, as many as are enough, or all of them."""

LEAST = 2048


def enough_rows(rows: int) -> int:
    """Return how many random rows of a batch are enough for Fisher-vector products.

    These are all rows up to 2048, and then 2048 or a tenth, whichever is more.

    Args:
        rows: Of the whole batch.
    """
    return min(rows, max(LEAST, rows // 10))


def curvature_rows(
    curvature: CurvatureShare,
    count: int,
    generator: torch.Generator | None,
    *,
    most: int | None = None,
) -> Tensor | None:
    """Draw the rows that Fisher-vector products are taken on.

    ``"auto"`` never touches torch's global generator. It draws by a generator of a fixed seed if
    none is given, and draws nothing if it takes all rows.

    Args:
        curvature: The share of the rows, in (0, 1). ``"auto"``: ``enough_rows``. None: all.
        count: How many rows there are.
        generator: The generator that draws. None: torch's global one for a share.
        most: The most rows that may be evaluated at once. If ``"auto"`` needs more, it takes all,
            which the caller evaluates in pieces.

    Returns:
        Their indices, in order, at least one; None for all.

    Raises:
        TrustRegionError: If ``curvature`` is something else.
    """
    if curvature is None:
        return None
    if curvature == "auto":
        taken = enough_rows(count)
        if taken == count or taken > (most or count):
            return None
        generator = generator or torch.Generator().manual_seed(0)
    elif isinstance(curvature, str) or not 0 < curvature < 1:
        raise TrustRegionError(
            f"curvature is {curvature!r}; it must be 'auto', a share in (0, 1), or None for all "
            "rows."
        )
    else:
        taken = max(1, round(curvature * count))
    return torch.randperm(count, generator=generator)[:taken].sort().values
