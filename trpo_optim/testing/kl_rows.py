"""The KL that a closure states, beside that of its distributions or log-probabilities by row."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.distributions import Distribution

from trpo_optim.closure.checks import Values
from trpo_optim.closure.evaluation import Objective
from trpo_optim.distributions import frozen
from trpo_optim.distributions.kl import kl_of_family
from trpo_optim.distributions.parts import leaves, tensors
from trpo_optim.errors import NoClosedFormError, TrustRegionError
from trpo_optim.testing.closure_subject import ClosureSubject
from trpo_optim.testing.observed import distributions_made, of_new_policy

__all__ = [
    "Measured",
    "behind_kl",
    "by_distributions",
    "by_log_probabilities",
    "evaluated",
    "measured",
]

_FAR, _FAR_AWAY = 1e-3, 0.3
"""Nats of the mean KL at which it is looked at: above rounding, and quadratic within a few % or far
from that."""

_DIRECTIONS = 3
"""Which tell a constant factor from weights that differ between rows."""

_Read = Callable[[], "list[Measured]"]
"""Returns the KL of each closure where the parameters are, and that of every row."""


@dataclass(frozen=True)
class Measured:
    """The KL at a step forward and backward.

    Attributes:
        stated: What a closure says.
        rows: What its distributions or log-probabilities say, of its batch's shape.
        mask: Which of the rows count. None: all.
        name: Which of several closures it is. Empty if there is only one.
        turned: KL(new ‖ old) by row. None: not known.
        actions_first: Whether the first dimension is known to count actions.
        step: The step forward. None: not known.
    """

    stated: float
    rows: Tensor
    mask: Tensor | None
    name: str = ""
    turned: Tensor | None = None
    actions_first: bool = False
    step: Tensor | None = None

    @property
    def mean(self) -> float:
        """The mean over the rows that count."""
        rows, mask = self.rows, self.mask
        return float(rows.mean() if mask is None else (rows * mask).sum() / mask.sum())


def measured(
    subject: ClosureSubject, reader: Callable[[ClosureSubject], _Read], *, far: bool = False
) -> list[list[Measured]]:
    """Return the KL of each closure in several directions; nothing where there is none to be read.

    Args:
        subject: The closures.
        reader: Keeps the old policy, the parameters being where they were.
        far: Whether to look far away, at one side, where KL(new ‖ old) is another number.
    """
    read = reader(subject)
    here = [each.stated for each in read()]  # which another check has found to be zero, or not
    look, wanted = (_one_way, _FAR_AWAY) if far else (_both_ways, 2 * _FAR)
    found = []
    for seed in range(_DIRECTIONS):
        generator = torch.Generator("cpu").manual_seed(seed)
        step = subject.direction()
        step = step * torch.randn(len(step), generator=generator, device="cpu").to(step)
        for _ in range(20):
            parts = look(subject, read, step, here)
            mean = math.inf
            if parts is not None:
                mean = sum(each.mean for each in parts) / len(parts)
                if wanted / 4 <= mean <= 2 * wanted:
                    found.append([replace(each, step=step) for each in parts])
                    break
            step = step * min(max(math.sqrt(wanted / mean), 1 / 8), 8) if mean > 0 else step
    return [list(each) for each in zip(*found, strict=True)] if len(found) == _DIRECTIONS else []


def _one_way(
    subject: ClosureSubject, read: _Read, step: Tensor, here: list[float]
) -> list[Measured] | None:
    """Return the KLs at a step, or None where they are not numbers."""
    with subject.at(step):
        try:
            parts = read()
        except TrustRegionError:
            raise
        except ValueError:  # too far for the distribution's arguments
            return None
    if not all(math.isfinite(each.stated) and each.rows.isfinite().all() for each in parts):
        return None
    return [
        replace(each, stated=each.stated - zero) for each, zero in zip(parts, here, strict=True)
    ]


def _both_ways(
    subject: ClosureSubject, read: _Read, step: Tensor, here: list[float]
) -> list[Measured] | None:
    """Return the KLs' sums over a step and its opposite, in which no third derivative is left."""
    ahead, behind = (_one_way(subject, read, way, here) for way in (step, -step))
    if ahead is None or behind is None:
        return None
    return [
        replace(one, stated=one.stated + other.stated, rows=one.rows + other.rows)
        for one, other in zip(ahead, behind, strict=True)
    ]


def by_distributions(subject: ClosureSubject) -> _Read:
    """Return what evaluates the closures, and the KLs of the distributions that they make.

    These are a closure's third value, or else what it makes of the parameters.

    Raises:
        NoClosedFormError: If there are none.
    """
    parts = subject.batch.parts
    old = []
    for part in parts:
        _, before, _ = evaluated(part)
        if not before:
            raise NoClosedFormError("The closure makes no distribution.")
        old.append([frozen(each) for each in before])
    actions = None if subject.log_prob is None else tuple(subject.log_prob().shape)

    def read() -> list[Measured]:
        stated, kls, turned, wholes = [], [], [], []
        for part, before in zip(parts, old, strict=True):
            kl, new, whole = evaluated(part)
            stated.append(kl)
            kls.append([kl_of_family(*pair, "") for pair in zip(before, new, strict=True)])
            turned.append([kl_of_family(*pair, "") for pair in zip(new, before, strict=True)])
            wholes.append(whole)
        masks = _masks(subject.cpu_mask, [each[0] for each in kls])
        count = sum(len(each[0]) for each in kls if each[0].dim())
        return [
            Measured(
                kl,
                _joint(to_new, mask, repeated=not whole),
                mask,
                part.name,
                _joint(to_old, mask, repeated=not whole),
                actions_first=actions == (count,),
            )
            for kl, to_new, to_old, mask, whole, part in zip(
                stated, kls, turned, masks, wholes, parts, strict=True
            )
        ]

    return read


def evaluated(part: Objective) -> tuple[float, list[Distribution], bool]:
    """Return a closure's KL, its new distributions, and whether its third value holds these."""
    values, third, new = _made(part)
    within = [each for each in new if _is_behind(values.kl, each)]  # others belong to the loss
    return float(values.kl), third or within or new, bool(third)


def behind_kl(part: Objective) -> tuple[Values, list[Distribution]]:
    """Return what a closure returns, with its graph, and the distributions behind its KL."""
    values, third, new = _made(part)
    if third and all(_is_behind(values.kl, each) for each in third):
        return values, third
    return values, [each for each in new if _is_behind(values.kl, each)]


def _made(part: Objective) -> tuple[Values, list[Distribution], list[Distribution]]:
    """Return what a closure returns, the distributions in its third value, and all new ones."""
    with distributions_made() as made:
        values = part.with_graph()
    return values, _distributions_in(values.third), of_new_policy(made)


def _is_behind(kl: Tensor, dist: Distribution) -> bool:
    inputs = [each for each in tensors(dist) if each.requires_grad]
    if not kl.requires_grad:
        return False
    try:
        slopes = torch.autograd.grad(kl, inputs, allow_unused=True, retain_graph=True)
    except RuntimeError:  # a reentrant checkpoint
        return True
    return any(each is not None for each in slopes)


def by_log_probabilities(subject: ClosureSubject) -> _Read:
    """Return what evaluates the closures together, and r − 1 − ln r of every action."""
    assert subject.log_prob is not None
    log_prob = subject.log_prob
    before = log_prob().detach().double()

    def read() -> list[Measured]:
        stated = subject.batch.values().kl
        change = log_prob().detach().double() - before
        return [Measured(stated, (torch.expm1(change) - change).cpu(), subject.cpu_mask)]

    return read


def _masks(mask: Tensor | None, kls: list[Tensor]) -> list[Tensor | None]:
    """Return the mask of each closure, of one that is of all their rows in order.

    Args:
        mask: Of all rows. None: all count.
        kls: Of each closure, its rows first.

    Raises:
        TrustRegionError: If the mask has another number of rows.
    """
    if mask is None or len(kls) == 1:
        return [mask] * len(kls)
    lengths = [each.shape[0] if each.dim() else 0 for each in kls]
    if sum(lengths) != len(mask):
        raise TrustRegionError(
            f"The mask has {len(mask)} rows and the closures' distributions {sum(lengths)}."
        )
    return list(mask.split(lengths))


def _distributions_in(third: Any) -> list[Distribution]:
    """Return the distributions of a third value, if it consists of these."""
    try:
        return leaves(third)
    except TrustRegionError:
        return []


def _joint(kls: list[Tensor], mask: Tensor | None, *, repeated: bool) -> Tensor:
    """Return the sum over the parts of an action, of the batch's shape, in double precision.

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
    return torch.stack(parts).sum(0).detach().double().cpu()


def _same(left: Tensor, right: Tensor) -> bool:
    return left.shape == right.shape and torch.allclose(left, right, rtol=1e-3)
