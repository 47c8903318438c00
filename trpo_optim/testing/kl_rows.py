"""The KL that a closure states, beside that of its distributions or log-probabilities by row."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.distributions import Distribution

from trpo_optim.distributions import frozen
from trpo_optim.distributions.kl import kl_of_family
from trpo_optim.distributions.parts import leaves
from trpo_optim.errors import NoClosedFormError, TrustRegionError
from trpo_optim.testing.closure_subject import ClosureSubject
from trpo_optim.testing.observed import distributions_made, of_new_policy

__all__ = [
    "Measured",
    "by_distributions",
    "by_log_probabilities",
    "evaluated",
    "masked_mean",
    "measured",
]

_FAR = 1e-3
"""Nats of the mean KL at which it is looked at: above rounding, and quadratic within a few %."""

_DIRECTIONS = 3
"""Which tell a constant factor from weights that differ between rows."""

_Old = Callable[[], tuple[float, Tensor]]
"""Returns the closure's KL where the parameters are, and that of every row."""

_Read = Callable[[ClosureSubject], _Old]
"""Keeps the old policy, the parameters being where they were."""


@dataclass(frozen=True)
class Measured:
    """The KL at a step forward and backward.

    Attributes:
        stated: What the closure says.
        rows: What its distributions or log-probabilities say, of the batch's shape.
    """

    stated: float
    rows: Tensor


def masked_mean(rows: Tensor, mask: Tensor | None) -> Tensor:
    """Return the mean over what counts."""
    return rows.mean() if mask is None else (rows * mask).sum() / mask.sum()


def measured(subject: ClosureSubject, read: _Read) -> list[Measured]:
    """Return the KL in several directions; nothing where there is none to be read."""
    old = read(subject)
    here = subject.kl()  # which another check has found to be zero, or not
    found = []
    for seed in range(_DIRECTIONS):
        generator = torch.Generator().manual_seed(seed)
        step = subject.direction()
        step = step * torch.randn(len(step), generator=generator).to(step)
        for _ in range(20):
            each = _both_ways(subject, old, step, here)
            mean = math.inf if each is None else float(masked_mean(each.rows, subject.mask)) / 2
            if each is not None and _FAR / 4 <= mean <= 2 * _FAR:
                found.append(each)
                break
            step = step * min(max(math.sqrt(_FAR / mean), 1 / 8), 8) if mean > 0 else step
    return found if len(found) == _DIRECTIONS else []


def _both_ways(subject: ClosureSubject, old: _Old, step: Tensor, here: float) -> Measured | None:
    """Return the KLs' sums over a step and its opposite, in which no third derivative is left."""
    stated, rows = -2 * here, torch.zeros((), dtype=torch.float64)
    for way in (step, -step):
        with subject.at(way):
            try:
                kl, part = old()
            except TrustRegionError:
                raise
            except ValueError:  # too far for the distribution's arguments
                return None
        if not (math.isfinite(kl) and part.isfinite().all()):
            return None
        stated, rows = stated + kl, rows + part.detach().double().cpu()
    return Measured(stated, rows)


def by_distributions(subject: ClosureSubject) -> _Old:
    """Return what evaluates the closure, and the KLs of the distributions that it makes.

    These are its third value, or else what it makes of the parameters.

    Raises:
        NoClosedFormError: If there are none.
    """
    _, before, _ = evaluated(subject)
    if not before:
        raise NoClosedFormError("The closure makes no distribution.")
    old = [frozen(each) for each in before]

    def read() -> tuple[float, Tensor]:
        stated, new, whole = evaluated(subject)
        kls = [kl_of_family(*pair, "") for pair in zip(old, new, strict=True)]
        return stated, _joint(kls, subject.mask, repeated=not whole)

    return read


def evaluated(subject: ClosureSubject) -> tuple[float, list[Distribution], bool]:
    """Return the closure's KL, its new distributions, and whether its third value holds these."""
    with distributions_made() as made:
        values = subject.objective.with_graph()
    third = _distributions_in(values.third)
    return float(values.kl), third or of_new_policy(made), bool(third)


def by_log_probabilities(subject: ClosureSubject) -> _Old:
    """Return what evaluates the closure, and r − 1 − ln r of every action."""
    assert subject.log_prob is not None
    log_prob = subject.log_prob
    before = log_prob().detach().double()

    def read() -> tuple[float, Tensor]:
        stated = subject.objective.values().kl
        change = log_prob().detach().double() - before
        return stated, torch.expm1(change) - change

    return read


def _distributions_in(third: Any) -> list[Distribution]:
    """Return the distributions of a third value, if it consists of these."""
    try:
        return leaves(third)
    except TrustRegionError:
        return []


def _joint(kls: list[Tensor], mask: Tensor | None, *, repeated: bool) -> Tensor:
    """Return the sum over the parts of an action, of the batch's shape.

    Args:
        kls: Of every distribution.
        mask: Dimensions beyond its own belong to the action.
        repeated: Whether one policy may be among them several times.

    Raises:
        TrustRegionError: If they are of several batches.
    """
    dims = min(each.dim() for each in kls) if mask is None else mask.dim()
    parts: list[Tensor] = []
    for each in kls:
        part = each.flatten(dims).sum(-1) if each.dim() > dims else each
        if not (repeated and any(_same(part, other) for other in parts)):
            parts.append(part)
    shapes = {tuple(part.shape) for part in [*parts, *([] if mask is None else [mask])]}
    if len(shapes) > 1:
        raise TrustRegionError(f"The closure's distributions are of the batches {shapes}.")
    return torch.stack(parts).sum(0)


def _same(left: Tensor, right: Tensor) -> bool:
    return left.shape == right.shape and torch.allclose(left, right, rtol=1e-3)
