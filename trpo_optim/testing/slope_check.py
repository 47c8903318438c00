"""The check of a closure's loss against its own gradient, at small steps both ways."""

from __future__ import annotations

import math

from torch import Tensor

from trpo_optim.testing.closure_subject import ClosureSubject, unit_of
from trpo_optim.testing.findings import Finding, Verdict, failed, undecided
from trpo_optim.testing.rounding import CERTAIN, departures

__all__ = ["check_slope"]

_NATS = (1e-3, 1e-4, 1e-5)
"""KLs of the steps at which the loss is looked at."""

_CLOSE = 0.1
"""By how much the loss's rise may differ from what its gradient foretells, relative."""

_ROUNDING = 0.05
"""The largest share of that rise that rounding may make up."""

_REMEDY = (
    "Compute the old log-probabilities once before step(), and no part of the loss under detach() "
    "or no_grad(): the line search compares values of the loss. Do not clamp the ratio at 1: "
    "that is a kink."
)


def check_slope(subject: ClosureSubject) -> Finding:
    """The loss rises and falls as its gradient foretells: it is not detached, and has no kink."""
    name = "loss slope"
    gradient = subject.loss_gradient()
    if not gradient.any() or not gradient.isfinite().all():
        return undecided(name, "The gradient of the loss is zero, or not finite.")
    step, ratios, hidden = unit_of(gradient) * ~subject.at_bound, list[float](), False
    for nats in _NATS:
        found = _of_kl(subject, step, nats)
        if found is None:
            continue
        step = found
        ratio = _over_foretold(subject, step, gradient)
        if ratio is None:
            hidden = True
        else:
            ratios.append(ratio)
    if not ratios:
        return undecided(
            name,
            "Rounding of the loss hides how it rises."
            if hidden
            else "The KL does not rise along the gradient of the loss.",
        )
    best = min(ratios, key=lambda each: abs(each - 1))
    figures = {"rise over gradient": best}
    if abs(best - 1) <= _CLOSE:
        return Finding(name, Verdict.PASSED, figures)
    if max(ratios) - min(ratios) > _CLOSE * max(1.0, abs(best)):
        cause = "The loss has kinks, or rounding of its terms hides how it rises."
        return Finding(name, Verdict.UNDECIDED, figures, cause)
    cause = (
        f"Along its gradient, the loss changes by {best:.3g} times what the gradient foretells: a "
        "part of it is detached, or has a kink at the present policy."
    )
    return failed(name, figures, cause, _REMEDY)


def _over_foretold(subject: ClosureSubject, step: Tensor, gradient: Tensor) -> float | None:
    """Return the loss's rise over what its gradient foretells, or None if rounding hides it."""
    ahead, behind = (subject.values(sign * step).loss for sign in (1.0, -1.0))
    between = (subject.moved(step) - subject.moved(-step)).double() / 2
    foretold, rise = float(gradient.double() @ between), (ahead - behind) / 2
    rounding = subject.vector.precision * max(abs(ahead), abs(behind))
    if not 0 < foretold >= rounding / _ROUNDING:
        return None
    apart = abs(rise - foretold)
    if apart > _CLOSE * foretold:
        deviation, _ = departures(lambda scale: subject.values(scale * step).loss)
        if not apart > CERTAIN * deviation:
            return None
    return rise / foretold


def _of_kl(subject: ClosureSubject, step: Tensor, nats: float) -> Tensor | None:
    """Return a multiple of a step that makes about a KL, or None if there is none."""
    here = subject.kl()
    for _ in range(20):
        made = subject.kl(step) - here
        if nats / 3 <= made <= 3 * nats:
            return step
        factor = math.sqrt(nats / made) if made > 0 else 1 / 8 if math.isnan(made) else 8.0
        step = step * min(max(factor, 1 / 8), 8)
    return None
