"""Whether a KL has a smooth minimum where both policies are one."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
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

_SHORTER, _BETTER = (1 / 3, 1 / 10), 0.7
"""Multiples of a step at which a flaw is looked for again, and what shrinks one that is the step's:
a smooth KL of a policy that bends sharply is no parabola at long steps."""

_COARSE = (
    "Check the policy in float64, normalise the observations, or bound small scales from below."
)

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

    @property
    def unlike(self) -> float:
        """How much the KL differs from a parabola, where 1 is a flaw."""
        if not self.near > 0:
            return math.inf
        uneven = abs(self.forward - self.backward) / self.near / _UNEVEN
        return max(uneven, abs(math.log(max(self.twice, 1e-300) / self.near / 4) / math.log(1.2)))

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


def at_minimum(
    name: str, rise: _Rise, figures: Mapping[str, float], longer: Iterable[float]
) -> Finding:
    """Compare the KL at one and two steps, forward and backward.

    Args:
        name: The check.
        rise: From a multiple of a small step to by how much the KL rises there.
        figures: What else was measured.
        longer: Multiples of the step that are looked at if rounding hides the KL.

    Returns:
        A fault only if rounding does not explain it, and it stays at shorter steps.
    """
    first = _look(rise)
    measured = {**figures, **first.figures}
    if not first.flaw():
        return Finding(name, Verdict.PASSED, measured)
    finite = math.isfinite(first.near + first.twice)
    noise = _noise(rise, first.near) if finite else 0.0
    certain = first.flaw(noise)
    others = [_look(rise, factor) for factor in (_SHORTER if certain else longer)]
    sound = next((each for each in others if not each.flaw()), None)
    if sound is not None:
        return Finding(name, Verdict.PASSED, {**figures, **sound.figures})
    if certain and not any(each.unlike < _BETTER * first.unlike for each in others):
        return failed(name, measured, certain, REMEDY)
    told = "Rounding hides how the KL rises where both policies are one."
    if certain:
        told = "The KL is no parabola at moves that are long enough for rounding not to hide it."
    return Finding(name, Verdict.UNDECIDED, {**measured, "rounding": noise}, told, _COARSE)


def _look(rise: _Rise, factor: float = 1.0) -> _Look:
    forward, backward = rise(factor), rise(-factor)
    return _Look(forward, backward, rise(2 * factor) + rise(-2 * factor))


def _noise(rise: _Rise, near: float) -> float:
    """Return by how much rounding may change a KL."""
    deviation, offset = departures(rise)
    # Rounding of outputs alone is a KL, which all moves share. A smooth KL has none.
    shared = max(0.0, offset) if deviation > 0.01 * abs(near) else 0.0
    return CERTAIN * deviation + shared
