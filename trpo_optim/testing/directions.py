"""Directions in parameter space along which a policy changes."""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Tensor

from trpo_optim.testing.subject import Subject

__all__ = ["direction", "nudges"]

_SEEN, _TRIES = 1e-4, 4
"""Nats at which single precision sees a change that is still small, and how often it is tried."""

_NUDGES = 4
"""How often rounding is looked at."""


def nudges(subject: Subject) -> Iterator[Tensor]:
    """Yield moves of every parameter to the next number: all that follows rounds otherwise."""
    size = subject.vector.precision * subject.vector.current().abs()
    generator = torch.Generator("cpu").manual_seed(0)
    for _ in range(_NUDGES):
        yield size * torch.randn(size.shape, generator=generator, device="cpu").sign().to(size)


def direction(subject: Subject, seed: int, kl: float = 0.5) -> Tensor:
    """Return a fixed random step, of such a length that to second order the KL is ``kl``.

    That is half the mean square change of log_prob, whatever the KL is said to be.
    """
    generator = torch.Generator("cpu").manual_seed(seed)
    weights = torch.randn(subject.old_log_prob.shape, generator=generator, device="cpu").to(
        subject.old_log_prob
    )
    gradient = subject.gradient((subject.log_prob(subject.dist()) * weights).mean())
    # Noise by the measure of each parameter's own slope: what moves the policy little by its
    # slope would have to move so far that nothing is quadratic any more.
    pieces = [
        float(slope.norm())
        * torch.randn(slope.shape, generator=generator, device="cpu").to(slope)
        * (slope != 0)  # a parametrization may keep signs beside its parameters
        / max(1.0, slope.numel() ** 0.5)
        for slope in subject.vector.scatter(gradient)
    ]
    step: Tensor = (gradient + subject.vector.gather(pieces)) * ~subject.at_bound
    step /= step.norm().clamp_min(1e-300)
    small = 1e-6 if step.dtype is torch.float64 else 1e-3
    for _ in range(_TRIES):
        bend = _bend(subject, step, small)
        if not 0 < bend < math.inf:
            return step
        near = math.sqrt(2 * _SEEN / bend)
        if step.dtype is torch.float64 or 0.5 < near / small < 2:
            break  # otherwise rounding may hide the change, or it is not small
        small = near
    return step * math.sqrt(2 * kl / bend)


def _bend(subject: Subject, step: Tensor, scale: float) -> float:
    """Return the mean square slope of log_prob along a step."""
    with torch.no_grad(), subject.at(scale * step):
        change = subject.joint_log_prob(subject.dist()) - subject.old_joint_log_prob
    return subject.mean(change.square())[0] / scale**2
