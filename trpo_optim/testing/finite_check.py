"""The check that log-probabilities and their gradients are numbers wherever observations may be."""

from __future__ import annotations

import textwrap
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.distributions import Categorical

from trpo_optim.distributions.nesting import mapped
from trpo_optim.distributions.parts import leaves, made_of
from trpo_optim.testing.findings import Finding, Verdict, failed, undecided
from trpo_optim.testing.observations import are_rows
from trpo_optim.testing.subject import Subject

__all__ = ["check_finite"]


def check_finite(subject: Subject) -> Finding:
    """Log-probabilities and their gradient are numbers over the range of the observations."""
    name = "finite"
    if not are_rows(subject.observations):
        kind = "The observations are an object: the kit knows no corners of its range."
        return undecided(name, kind)
    for label, observations in _corners(subject.observations):
        cause = ""
        try:
            value = subject.log_prob(subject.dist(observations))
            slopes = torch.autograd.grad(value.sum(), subject.parameters, allow_unused=True)
            if not value.isfinite().all():
                cause = "log_prob is not finite"
            elif not all(_numbers(each).isfinite().all() for each in slopes if each is not None):
                cause = "the gradient of log_prob is not finite"
        except ValueError as error:
            cause = textwrap.shorten(f"the distribution cannot be made: {error}", 120)
        if cause and _rules_out(subject.old):
            return undecided(
                name,
                f"At {label}: {cause}. The policy rules actions out, and these observations, which "
                "the kit has made up, may rule out all.",
            )
        if cause:
            return failed(
                name,
                {},
                f"At {label}: {cause}.",
                "Bound what goes into exp, log and division: clamp log_std, softplus for scales, "
                "normalised observations.",
            )
    return Finding(name, Verdict.PASSED)


def _numbers(slope: Tensor) -> Tensor:
    """Return a gradient's numbers, which may be sparse."""
    return slope.coalesce().values() if slope.is_sparse else slope


def _corners(observations: Any) -> Iterator[tuple[str, Any]]:
    """Yield observations at the edges of the range that was given, and zeros if they lie within.

    What is 0 or 1 throughout stays: masks and one-hot codes hold together.
    """

    def numbers(value: Tensor) -> Tensor:
        return ~((value == 0) | (value == 1)).all(0) & value.is_floating_point()

    def zeros(value: Tensor) -> Tensor:
        if not value.is_floating_point():
            return value
        nearest = torch.zeros_like(value).clamp(value.amin(0), value.amax(0))
        return torch.where(numbers(value), nearest, value)

    def corners(value: Tensor) -> Tensor:
        low = torch.rand(value.shape, device="cpu").to(value.device) < 0.5
        edges = torch.where(low, value.amin(0), value.amax(0))
        return torch.where(numbers(value), edges, value)

    yield "observations of zeros", mapped(zeros, observations)
    yield "corners of the observations' range", mapped(corners, observations)


def _rules_out(policy: Any) -> bool:
    """Return whether a policy gives some actions the probability zero."""
    categorical = (each for leaf in leaves(policy) for each in made_of(leaf))
    return any(
        bool((each.probs == 0).any()) for each in categorical if isinstance(each, Categorical)
    )
