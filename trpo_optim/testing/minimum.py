"""Whether a KL has a smooth minimum where both policies are one."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass

from trpo_optim.testing.findings import Finding, Verdict, failed
from trpo_optim.testing.rounding import CERTAIN, departures

__all__ = ["REMEDY", "at_minimum"]

REMEDY = (
    "Return the mean of KL(old || new) alone (no negative, root, absolute value, penalty or "
    "entropy), of distributions over the same actions; keep the old one by frozen(), so that it "
    "does not move with the new one."
)

_UNEVEN, _GROWTH = 0.35, (3.2, 4.8)
"""How uneven the KL may be forward and backward, and what it may grow by at twice the step."""

_Rise = Callable[[float], float]
"""From a multiple of a small step to by how much the KL rises there."""


@dataclass(frozen=True)
class _Look:
    """The KL at one and two steps, forward and backward.

    Attributes:
        forward: Its rise at one step.
        backward: Its rise at the opposite.
        twice: The sum of its rises at twice both.
    """

    forward: float
    backward: float
    twice: float

    @property
    def near(self) -> float:
        """The sum of the rises at one step."""
        return self.forward + self.backward

    @property
    def figures(self) -> dict[str, float]:
        """What was measured."""
        growth = self.twice / self.near if self.near else math.nan
        return {"forward": self.forward, "backward": self.backward, "growth": growth}

    def flaw(self, noise: float = 0.0) -> str:
        """Return what is wrong even if each KL is wrong by some noise, or an empty string."""
        near, far, growth = self.near, self.twice, self.figures["growth"]
        if not near + 2 * noise > 0:
            return f"The KL does not rise when the policy moves ({near / 2:.3g})."
        if abs(self.forward - self.backward) > _UNEVEN * (near + 2 * noise) + 2 * noise:
            return "The KL has a slope where both policies are one."
        least, most = _GROWTH
        if not least * (near - 2 * noise) - 2 * noise < far < most * (near + 2 * noise) + 2 * noise:
            return f"Twice the step gives {growth:.2f} times the KL, where 4 is right."
        return ""


def at_minimum(name: str, rises: Iterable[_Rise], figures: dict[str, float]) -> Finding:
    """Compare the KL at one and two steps, forward and backward.

    Args:
        name: The check.
        rises: Of a small step, and of longer ones. These are looked at if rounding hides the KL.
        figures: What else was measured.

    Returns:
        A fault only if rounding does not explain it at the first step.
    """
    found = list[Finding]()
    for rise in rises:
        look = _Look(rise(1.0), rise(-1.0), rise(2.0) + rise(-2.0))
        cause = look.flaw()
        measured = {**figures, **look.figures}
        if not cause:
            return Finding(name, Verdict.PASSED, measured)
        noise = _noise(rise, look.near) if math.isfinite(look.near + look.twice) else 0.0
        if not found and (certain := look.flaw(noise)):
            return failed(name, measured, certain, REMEDY)
        told = "Rounding hides how the KL rises where both policies are one."
        found.append(
            Finding(
                name,
                Verdict.UNDECIDED,
                {**measured, "rounding": noise},
                told,
                "Check the policy in higher precision. If its scale is very small, bound it.",
            )
        )
    return found[0]


def _noise(rise: _Rise, near: float) -> float:
    """Return by how much rounding may change a KL."""
    deviation, offset = departures(rise)
    # Rounding of outputs alone is a KL, which all moves share. A smooth KL has none.
    shared = max(0.0, offset) if deviation > 0.01 * abs(near) else 0.0
    return CERTAIN * deviation + shared
