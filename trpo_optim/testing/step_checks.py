"""The check of a whole step: it is safe, it improves, and it does what the local model says."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from trpo_optim.optimizer import TrustRegionOptimizer
from trpo_optim.report import StepReport
from trpo_optim.testing.directions import nudges
from trpo_optim.testing.findings import Finding, Verdict, failed, undecided
from trpo_optim.testing.subject import Subject

__all__ = ["check_step"]

_RADII = (1e-4, 1e-5, 1e-6, 1e-7, 1e-9)
"""Where agreement is looked for: sharply curved policies agree at small radii alone, and single
precision at large ones."""

_AGREED = 1.5
"""How many times the local model's prediction what was measured may be, or the other way round."""

_HIDDEN = 0.05
"""The share of a radius that rounding may make up."""


def check_step(subject: Subject) -> Finding:
    """A step improves, keeps the radius, and agrees with the local model as that shrinks."""
    name = "step"
    if subject.refusal:
        return undecided(name, "There are no Fisher-vector products.")
    if not _smooth(subject):
        return undecided(name, "All parameters lie at the bound of a clamp.")
    report = _step(subject, 1e-2)
    if not report.accepted:
        return failed(name, {"max_kl": 1e-2}, f"With max_kl=0.01: {report.outcome.message}")
    figures = dict[str, float]()
    least = 0.0 if subject.vector.dtype is torch.float64 else 1e-6
    rounding = _of_rounding(subject)
    radii = [each for each in _RADII if each >= max(least, rounding / _HIDDEN)]
    if not radii:
        cause = f"Rounding makes up {rounding:.3g} of the KL, which hides steps within small radii."
        return undecided(name, cause, "Bound small scales from below, or use float64.")
    for radius in radii:
        report = _step(subject, radius)
        figures = {
            "max_kl": radius,
            "kl over model": report.trial_kl / report.predicted_kl,
            "gain over model": report.improvement / report.predicted_improvement,
        }
        ratios = [max(value, 1e-9) for label, value in figures.items() if "over" in label]
        if report.accepted and all(abs(math.log(ratio)) < math.log(_AGREED) for ratio in ratios):
            return Finding(name, Verdict.PASSED, figures)
    return failed(
        name,
        figures,
        "However small the radius, KL or improvement are not what the local model says: the policy "
        "that is differentiated is not the one that is tried.",
        "Look for what depends on the grad mode (torch.is_grad_enabled), for rounding with a "
        "straight-through gradient, and for parameters that forward writes.",
    )


def _of_rounding(subject: Subject) -> float:
    """Return the KL that rounding of the parameters makes."""
    kls = []
    for step in nudges(subject):
        with torch.no_grad(), subject.at(step):
            kls.append(float(subject.kl(subject.dist())))
    return max((each for each in kls if math.isfinite(each)), default=0.0)


def _step(subject: Subject, radius: float) -> StepReport:
    """Take a step and go back."""
    with subject.at(torch.zeros((), device=subject.vector.device)):
        optimizer = TrustRegionOptimizer(_smooth(subject), max_kl=radius)
        return optimizer.step(subject.closure(third=True))


def _smooth(subject: Subject) -> list[Tensor]:
    """Return the parameters of which nothing lies at the bound of a clamp."""
    parts = subject.vector.split(subject.at_bound)
    return [
        each
        for each, close in zip(subject.vector.parameters, parts, strict=True)
        if not close.any()
    ]
