"""Whether a KL has a smooth minimum where both policies are one."""

from __future__ import annotations

import math
from collections.abc import Callable

__all__ = ["REMEDY", "flaw_at_minimum"]

REMEDY = (
    "Return the mean of KL(old || new) alone (no negative, root, absolute value, penalty or "
    "entropy), of distributions over the same actions; keep the old one by frozen(), so that it "
    "does not move with the new one."
)


def flaw_at_minimum(rise: Callable[[float], float]) -> tuple[dict[str, float], str]:
    """Compare the KL at one and two steps, forward and backward.

    Args:
        rise: From a multiple of a small step to by how much the KL rises there.

    Returns:
        What was measured, and what is wrong with it, or an empty string.
    """
    forward, backward = rise(1.0), rise(-1.0)
    near, far = forward + backward, rise(2.0) + rise(-2.0)
    growth = far / near if near else math.nan
    figures = {"forward": forward, "backward": backward, "growth": growth}
    if not near > 0:
        return figures, f"The KL does not rise when the policy moves ({near / 2:.3g})."
    if abs(forward - backward) > 0.35 * near:
        return figures, "The KL has a slope where both policies are one."
    if not 3.2 < growth < 4.8:
        return figures, f"Twice the step gives {growth:.2f} times the KL, where 4 is right."
    return figures, ""
