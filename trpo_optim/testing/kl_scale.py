"""The check of a closure's KL against that of the distributions that it makes, row by row."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
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
from trpo_optim.testing.findings import Finding, Verdict
from trpo_optim.testing.observed import distributions_made, of_new_policy

__all__ = ["check_kl_scale"]

_FAR = 1e-3
"""Nats of the mean KL at which it is looked at: above rounding, and quadratic within a few %."""

_DIRECTIONS = 3
"""Which tell a constant factor from weights that differ between rows."""

_SAME = 0.03
"""By how much two KLs may differ that are meant to be the same, relative."""

_ENOUGH = 32
"""Actions whose log-probabilities alone give the KL within a factor of three."""

_REMEDY = "Return mean_kl(old, new), or with padding mean_kl(old, new, mask)."


_Old = Callable[[], tuple[float, Tensor]]
"""Returns the closure's KL where the parameters are, and that of every row."""

_Read = Callable[[ClosureSubject], _Old]
"""Keeps the old policy, the parameters being where they were."""


@dataclass(frozen=True)
class _Measured:
    """The KL at a step forward and backward.

    Attributes:
        stated: What the closure says.
        rows: What its distributions or log-probabilities say, of the batch's shape.
    """

    stated: float
    rows: Tensor


def check_kl_scale(subject: ClosureSubject) -> Finding:
    """The KL is an average over the batch, neither a sum nor an average over more than that."""
    name = "kl scale"
    exact = True
    try:
        found = _measured(subject, _by_distributions)
    except (TrustRegionError, RuntimeError):  # no KL of these is known
        found = []
    if not found and subject.log_prob is not None:
        exact, found = False, _measured(subject, _by_log_probabilities)
    if not found:
        return Finding(
            name,
            Verdict.UNDECIDED,
            {},
            "The closure makes no distribution whose KL is known.",
            "Return the new one as the third value, or pass log_prob to check the KL's scale.",
        )
    if not exact and found[0].rows.numel() < _ENOUGH:
        return Finding(name, Verdict.UNDECIDED, {}, "The actions are too few to estimate the KL.")
    ratio = sum(each.stated / float(_masked_mean(each.rows, subject.mask)) for each in found)
    figures = {"kl over mean of rows": ratio / len(found), "rows": float(found[0].rows.numel())}
    cause = _flaw(found, subject.mask) if exact else _rough_flaw(found, subject.mask)
    if not cause:
        return Finding(name, Verdict.PASSED, figures)
    return Finding(name, Verdict.FAILED, figures, cause, _REMEDY)


def _flaw(found: list[_Measured], mask: Tensor | None) -> str:
    """Return what the KL is instead of an average over the rows that count, or nothing."""
    tables = [_averages(each.rows, mask) for each in found]
    if any(_is(found, [sound[name] for sound, _ in tables]) for name in tables[0][0]):
        return ""
    for name in tables[0][1]:
        if _is(found, [faulty[name] for _, faulty in tables]):
            return name
    ratios = [each.stated / float(each.rows.mean()) for each in found]
    constant = max(ratios) < 1.01 * min(ratios)
    if constant and not _weights_may_explain(found):
        return (
            f"The closure's KL is {ratios[0]:.4g} times the mean KL(old || new) of the "
            "distributions that it makes: a factor, or a sum or average over other dimensions "
            "than the batch's."
        )
    return ""


def _weights_may_explain(found: list[_Measured]) -> bool:
    """Return whether a constant ratio may come of weights, by which some rows do not count.

    Not if the KL lies beyond those of all rows, nor if the rows differ otherwise in every
    direction, so that no weights but equal ones give one ratio.
    """
    shares = [each.rows.flatten() / each.rows.sum() for each in found]
    alike = any(
        float((ours - theirs).abs().sum()) < 0.2
        for index, ours in enumerate(shares)
        for theirs in shares[:index]
    )
    return alike and any(
        0.9 * float(each.rows.min()) < each.stated < 1.1 * float(_most(each.rows)) for each in found
    )


def _rough_flaw(found: list[_Measured], mask: Tensor | None) -> str:
    ratios = [each.stated / float(_masked_mean(each.rows, mask)) for each in found]
    if min(ratios) < 3:
        return ""
    return (
        f"The closure's KL is about {min(ratios):.2g} times what the log-probabilities of the "
        f"{found[0].rows.numel()} actions give: it is summed over the batch, not averaged."
    )


def _is(found: list[_Measured], values: list[Tensor]) -> bool:
    """Return whether the closure's KL is a certain average in every direction."""
    pairs = zip(found, values, strict=True)
    return all(math.isclose(each.stated, float(value), rel_tol=_SAME) for each, value in pairs)


def _averages(
    rows: Tensor, mask: Tensor | None
) -> tuple[Mapping[str, Tensor], Mapping[str, Tensor]]:
    """Return what a KL may be, by name, and what it may not be, by what is wrong then."""
    count = rows.numel()
    counted = torch.ones_like(rows, dtype=torch.bool) if mask is None else mask.bool()
    inside = rows * counted
    per_row = counted.flatten(1).sum(1) if rows.dim() > 1 else counted
    sound = {"mean": inside.sum() / counted.sum()}
    if rows.dim() > 1:  # a sequence may be one action, whichever dimension comes first
        sound["of sequences"] = inside.sum() / (per_row > 0).sum()
        sound["of sequences, time first"] = inside.sum() / counted.flatten(1).any(0).sum()
        means = inside.flatten(1).sum(1) / per_row.clamp_min(1)
        sound["mean of sequences"] = means.sum() / (per_row > 0).sum()
    faulty = {
        f"The closure's KL is summed over the batch of {count}, not averaged.": rows.sum(),
        f"The closure's KL is summed over the {int(counted.sum())} elements that count, not "
        "averaged.": inside.sum(),
    }
    if not counted.all():
        outside = f"prompt or padding: {int((~counted).sum())} of {count} elements"
        faulty[f"The closure's KL is averaged over {outside} that the mask leaves out count."] = (
            rows.mean()
        )
        faulty[f"The closure's KL is divided by the number of all elements, {outside} count."] = (
            inside.sum() / count
        )
    return sound, faulty


def _most(rows: Tensor) -> Tensor:
    """Return the largest KL of what may be one action."""
    if rows.dim() < 2:
        return rows.max()
    return torch.maximum(rows.flatten(1).sum(1).max(), rows.sum(0).max())


def _masked_mean(rows: Tensor, mask: Tensor | None) -> Tensor:
    return rows.mean() if mask is None else (rows * mask).sum() / mask.sum()


def _measured(subject: ClosureSubject, read: _Read) -> list[_Measured]:
    """Return the KL in several directions; nothing where there is none to be read."""
    old = read(subject)
    here = subject.kl()  # which another check has found to be zero, or not
    measured = []
    for seed in range(_DIRECTIONS):
        generator = torch.Generator().manual_seed(seed)
        step = subject.direction()
        step = step * torch.randn(len(step), generator=generator).to(step)
        for _ in range(20):
            each = _both_ways(subject, old, step, here)
            mean = math.inf if each is None else float(_masked_mean(each.rows, subject.mask)) / 2
            if each is not None and _FAR / 4 <= mean <= 2 * _FAR:
                measured.append(each)
                break
            step = step * min(max(math.sqrt(_FAR / mean), 1 / 8), 8) if mean > 0 else step
    return measured if len(measured) == _DIRECTIONS else []


def _both_ways(subject: ClosureSubject, old: _Old, step: Tensor, here: float) -> _Measured | None:
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
    return _Measured(stated, rows)


def _by_distributions(subject: ClosureSubject) -> _Old:
    """Return what evaluates the closure, and the KLs of the distributions that it makes.

    These are its third value, or else what it makes of the parameters.

    Raises:
        NoClosedFormError: If there are none.
    """

    def evaluated() -> tuple[float, list[Distribution], bool]:
        with distributions_made() as made:
            values = subject.objective.with_graph()
        third = _distributions_in(values.third)
        return float(values.kl), third or of_new_policy(made), bool(third)

    _, before, _ = evaluated()
    if not before:
        raise NoClosedFormError("The closure makes no distribution.")
    old = [frozen(each) for each in before]

    def read() -> tuple[float, Tensor]:
        stated, new, whole = evaluated()
        kls = [kl_of_family(*pair, "") for pair in zip(old, new, strict=True)]
        return stated, _joint(kls, subject.mask, repeated=not whole)

    return read


def _by_log_probabilities(subject: ClosureSubject) -> _Old:
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
