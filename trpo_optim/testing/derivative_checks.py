"""Checks of derivatives: the score, the KL where both policies are one, the Fisher matrix."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import accumulate

import torch
from torch import Tensor
from torch.distributions import Laplace

from trpo_optim.distributions.parts import leaves, made_of
from trpo_optim.testing.averages import sigmas
from trpo_optim.testing.directions import direction
from trpo_optim.testing.distribution_checks import on_edge
from trpo_optim.testing.findings import Finding, Verdict, failed, undecided
from trpo_optim.testing.minimum import REMEDY, at_minimum
from trpo_optim.testing.subject import Subject

__all__ = ["check_fisher", "check_score", "check_second_order", "check_zero_kl"]

_CLOSE = 0.03
"""Relative error of central differences in single precision."""

_OTHERS = "Fisher-vector products are not those of this policy."

_FISHER_REMEDY = (
    "Check the second derivatives of custom functions (torch.autograd.gradgradcheck), and that the "
    "KL is that of the distribution whose log_prob is used."
)

_ALL_AT_BOUND = "All parameters lie at the bound of a clamp."

_COARSE = (
    "Rounding may hide it: normalise the observations, bound small scales from below, or check the "
    "policy in float64."
)


def check_score(subject: Subject) -> Finding:
    """The surrogate's gradient by autograd is that by central differences of log_prob."""
    name = "score"
    vector = subject.vector
    worst, figures, at_worst = 0.0, dict[str, float](), torch.zeros(0, device="cpu")
    gradient = subject.gradient((subject.log_prob(subject.dist()) * subject.advantages).mean())
    width = 1e-7 if vector.dtype is torch.float64 else 2e-3
    for index, (start, end) in enumerate(_spans(subject)):
        if subject.at_bound[start:end].all():
            continue
        step = torch.zeros_like(gradient)
        generator = torch.Generator("cpu").manual_seed(index)
        noise = torch.randn(end - start, generator=generator, device="cpu").to(step)
        piece = gradient[start:end]
        noise = torch.where(piece != 0, noise, 0.0) if piece.any() else noise
        noise, piece = (each / each.norm().clamp_min(1e-30) for each in (noise, piece))
        step[start:end] = 0.5 * noise + piece
        step *= ~subject.at_bound
        step *= width * max(1.0, float(vector.parameters[index].detach().norm())) / step.norm()
        measured, stated = _difference(subject, step), float(gradient.dot(step))
        error = abs(measured - stated) / max(abs(measured), abs(stated), 100 * _rounding(subject))
        if not error <= worst:
            worst, at_worst = error, step
            figures = {"by autograd": stated, "by differences": measured, "error": error}
    if worst <= 2 * _CLOSE:
        return Finding(name, Verdict.PASSED, figures)
    twice = _difference(subject, 2 * at_worst) / 2
    apart = abs(twice - figures["by differences"])
    if apart > _CLOSE * max(abs(twice), abs(figures["by differences"]), _rounding(subject)):
        return Finding(
            name,
            Verdict.UNDECIDED,
            figures,
            "Differences of log_prob are no slope at this step's length: part of the policy "
            "computes in lower precision than its parameters have (autocast, bfloat16), or it is "
            "not smooth.",
        )
    return failed(
        name,
        figures,
        "The gradient of log_prob by autograd is not its slope: part of log_prob is detached, or a "
        "backward is wrong, so that the step raises something else than the probabilities of good "
        "actions.",
        "Drop detach(), .data or no_grad() inside log_prob, and check custom backwards with "
        "torch.autograd.gradcheck.",
    )


def _difference(subject: Subject, step: Tensor) -> float:
    """Return half by how much the surrogate differs between a step forward and backward."""
    ends = []
    for sign in (1.0, -1.0):
        with torch.no_grad(), subject.at(sign * step):
            logs = subject.log_prob(subject.dist()).double()
            ends.append(float((logs * subject.advantages).mean()))
    return (ends[0] - ends[1]) / 2


def _rounding(subject: Subject) -> float:
    """Return what rounding may change the surrogate by."""
    finest = torch.finfo(subject.vector.dtype).eps
    return finest * float(subject.old_log_prob.abs().mean() + 1)


def _spans(subject: Subject) -> list[tuple[int, int]]:
    """Return where each parameter lies in the vector."""
    ends = list(accumulate(each.numel() for each in subject.vector.parameters))
    return list(zip([0, *ends[:-1]], ends, strict=True))


def check_zero_kl(subject: Subject) -> Finding:
    """The KL of a policy with itself is zero, least there, and smooth."""
    name = "zero kl"
    double = subject.vector.dtype is torch.float64
    step = direction(subject, 1, kl=1e-7 if double else 1e-4)
    if not step.any():
        return undecided(name, _ALL_AT_BOUND)
    origin = torch.zeros_like(step)

    @torch.no_grad()
    def kl(scale: float) -> float:
        with subject.at(scale * step if scale else origin):
            return float(subject.kl(subject.dist()))

    here = kl(0.0)
    figures = {"kl(old, old)": here}
    if not abs(here) <= (1e-9 if double else 1e-5):
        return failed(name, figures, f"KL(old || old) is {here:.3g}, not zero.", REMEDY)
    return at_minimum(name, lambda scale: kl(scale) - here, figures, (3.0, 10.0))


def check_second_order(subject: Subject) -> Finding:
    """The KL can be differentiated twice, or by finite differences of its gradient."""
    name = "second order"
    if subject.refusal:
        return failed(name, {}, subject.refusal)
    with subject.model(third=True) as model:
        differences = model.engine == "finite differences"
    note = f"By finite differences: {model.fallback}." if differences else ""
    return Finding(name, Verdict.PASSED, {}, note)


def check_fisher(subject: Subject) -> Finding:
    """Fisher-vector products are symmetric, the KL's curvature, and the scores' spread."""
    name = "fisher"
    if subject.refusal:
        return undecided(name, "There are no Fisher-vector products.")
    if subject.lost > 1e-3:
        return undecided(name, on_edge(subject.lost))
    one, two = direction(subject, 2), direction(subject, 3)
    if not one.any():
        return undecided(name, _ALL_AT_BOUND)
    stated, cause = dict[str, float](), ""
    for third in (True, False):
        with subject.model(third=third) as model:
            product, other = model.product(one), model.product(two)
        stated[model.engine] = value = float(one.dot(product))
        crossed = abs(float(two.dot(product)) - float(one.dot(other)))
        if not value > 0:
            cause = f"v'Fv is {value:.4g} by {model.engine}, and it is not positive"
        elif not crossed <= 0.01 * value:
            cause = f"v'Fv is {value:.4g} by {model.engine}, and the operator is not symmetric"
        if cause:
            return failed(name, stated, f"{cause}: {_OTHERS}", _FISHER_REMEDY)
        if _kinked(subject):  # without the third value its Hessian is not meant to be right
            break
    found = list[_Curvature]()
    for scale in (1.0, 3.0, 1 / 3):
        found.append(_curvature(subject, one, scale))
        if not found[-1].against(stated):
            return Finding(name, Verdict.PASSED, {**found[-1].figures, **stated})
    first, *others = found
    figures = {**first.figures, **stated}
    if not any(first.like(each) for each in others):
        told = "Differences do not give the curvature: they change with the length of the move."
        return Finding(name, Verdict.UNDECIDED, figures, told, _COARSE)
    return failed(name, figures, f"{first.against(stated)}: {_OTHERS}", _FISHER_REMEDY)


@dataclass(frozen=True)
class _Curvature:
    """v'Fv in ways that need no second derivatives.

    Attributes:
        bend: By differences of the KL's gradient.
        spread: By the scores.
        noise: The standard error of that.
    """

    bend: float
    spread: float
    noise: float

    @property
    def figures(self) -> dict[str, float]:
        """What was measured."""
        return {"by differences": self.bend, "by scores": self.spread}

    def against(self, stated: Mapping[str, float]) -> str:
        """Return what is wrong with v'Fv by some engines, or an empty string."""
        for engine, value in stated.items():
            told = f"v'Fv is {value:.4g} by {engine}, and"
            if not abs(value - self.bend) <= 2 * _CLOSE * abs(self.bend):
                return f"{told} by differences of the KL's gradient it is {self.bend:.4g}"
            if abs(value - self.spread) > 2 * _CLOSE * self.spread + sigmas(1) * self.noise:
                return f"{told} the mean square of the scores along v is {self.spread:.4g}"
        return ""

    def like(self, other: _Curvature) -> bool:
        """Return whether moves of two lengths give the same, or neither gives a number."""
        pairs = ((self.bend, other.bend), (self.spread, other.spread))
        return all(
            math.isclose(one, two, rel_tol=_CLOSE) or not math.isfinite(one + two)
            for one, two in pairs
        )


def _curvature(subject: Subject, step: Tensor, factor: float) -> _Curvature:
    """Return v'Fv by differences over a multiple of the usual move."""
    scale = factor * (2e-5 if subject.vector.dtype is torch.float64 else 0.02)
    logs, bends = [], []
    for sign in (scale, -scale):
        with subject.at(sign * step):
            dist = subject.dist()
            bends.append(float(step.dot(subject.gradient(subject.kl(dist)))))
            with torch.no_grad():
                logs.append(subject.joint_log_prob(dist))
    score = (logs[0] - logs[1]) / (2 * scale)
    spread, noise = subject.mean(score.square())
    return _Curvature((bends[0] - bends[1]) / (2 * scale), spread, noise)


def _kinked(subject: Subject) -> bool:
    """Return whether torch's own KL has a Hessian that is not the Fisher matrix."""
    return any(isinstance(each, Laplace) for leaf in leaves(subject.old) for each in made_of(leaf))
