"""The check of a closure's KL against that of the distributions that it makes, row by row."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import Tensor

from trpo_optim.distributions.joint import draws_whole_actions
from trpo_optim.errors import TrustRegionError
from trpo_optim.testing.closure_subject import ClosureSubject
from trpo_optim.testing.findings import Finding, Verdict, failed, named, undecided
from trpo_optim.testing.kl_rows import (
    Measured,
    by_distributions,
    by_log_probabilities,
    evaluated,
    measured,
)
from trpo_optim.testing.kl_weights import weights_of_rows

__all__ = ["check_kl_scale"]

_SAME = 0.03
"""By how much two KLs may differ that are meant to be the same, relative."""

_TIME_FIRST = "of sequences, time first"
"""What an average is called whose sequences lie along the last dimension."""

_ENOUGH = 32
"""Actions whose log-probabilities alone give the KL within a factor of three."""

_REMEDY = "Return mean_kl(old, new), or with padding mean_kl(old, new, mask)."


def check_kl_scale(subject: ClosureSubject) -> Finding:
    """The KL is an average over the batch, neither a sum nor an average over more than that."""
    name = "kl scale"
    exact = True
    try:
        found = measured(subject, by_distributions)
    except (TrustRegionError, RuntimeError):  # no KL of these is known
        found = []
    if not found and subject.log_prob is not None:
        exact, found = False, measured(subject, by_log_probabilities)
    if not found:
        return undecided(
            name,
            "The closure makes no distribution whose KL is known.",
            "Return the new one as the third value, or pass log_prob to check the KL's scale.",
        )
    rows = sum(part[0].rows.numel() for part in found)
    if not exact and rows < _ENOUGH:
        return undecided(name, "The actions are too few to estimate the KL.")
    ratios = [each.stated / each.mean for part in found for each in part]
    figures = {"kl over mean of rows": sum(ratios) / len(ratios), "rows": float(rows)}
    for index, part in enumerate(found):
        cause = _flaw(part) if exact else _rough_flaw(part)
        cause = cause or (_by_weights(subject, part, index) if exact else "")
        if cause:
            return failed(name, figures, named(part[0].name, cause), _REMEDY)
    if exact and (cause := _fewer(found, subject)):
        return failed(name, figures, cause, _REMEDY)
    if cause := _over_dimensions(found, subject):
        return failed(name, figures, cause, _REMEDY)
    if exact and _is_turned(subject):
        cause = "The closure's KL is KL(new || old), not KL(old || new)."
        return failed(name, figures, cause, _REMEDY)
    if exact and (cause := _doubt(found, subject)):
        remedy = "Pass log_prob." if subject.log_prob is None else _REMEDY
        return Finding(name, Verdict.UNDECIDED, figures, cause, remedy)
    return Finding(name, Verdict.PASSED, figures)


def _flaw(found: list[Measured]) -> str:
    """Return what a closure's KL is instead of an average over the rows that count, or nothing."""
    tables = [_averages(each) for each in found]
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


def _by_weights(subject: ClosureSubject, found: list[Measured], index: int) -> str:
    """Return what is wrong with the weights of rows in a closure's KL, or nothing."""
    weights = weights_of_rows(subject, found, index)
    if weights is None or not any(each.stated for each in found):  # another check's fault
        return ""
    if weights.missed:
        rows = weights.covered + weights.missed
        return (
            f"At a small move, the closure's KL has a slope on {weights.covered} of the {rows} "
            "rows on which its loss has one: a slice, an index or max() leaves the others out, and "
            "no trust region holds them."
        )
    tables = [_averages(each)[0] for each in found]
    if any(_is(found, [table[name] for table in tables]) for name in tables[0]):
        return ""
    if weights.factor is None:
        return ""
    return (
        f"The closure's KL is {weights.factor:.4g} times the mean KL(old || new) of the "
        "distributions that it makes, by the same factor in every row."
    )


def _fewer(found: list[list[Measured]], subject: ClosureSubject) -> str:
    """Return what is wrong where the KL is of fewer rows than there are actions, or nothing."""
    rows = sum(part[0].rows.numel() for part in found)
    if subject.log_prob is None or any(part[0].rows.dim() != 1 for part in found):
        return ""
    shape = subject.log_prob().shape
    if len(shape) != 1 or rows >= shape[0]:
        return ""
    return f"The closure's KL is of {rows} rows, and log_prob of {shape[0]} actions."


def _is_turned(subject: ClosureSubject) -> bool:
    """Return whether the closure's KL is that of the policies in the other order."""
    for part in measured(subject, by_distributions, far=True):
        right = [_averages(each)[0] for each in part]
        turned = [
            _averages(replace(each, rows=each.turned))[0]
            for each in part
            if each.turned is not None
        ]
        for name in right[0]:
            theirs, ours = ([each[name] for each in table] for table in (turned, right))
            if _is(part, theirs, within=0.01) and not _is(part, ours):
                return True
    return False


def _over_dimensions(found: list[list[Measured]], subject: ClosureSubject) -> str:
    """Return over how many numbers of an action the KL is averaged, where it should be summed.

    The log-probabilities tell how many actions there are. Tokens of a sequence may be averaged.
    """
    rows = found[0][0].rows
    if subject.log_prob is None or subject.mask is not None or rows.dim() < 2:
        return ""
    shape = subject.log_prob().shape
    of_all = (sum(len(part[0].rows) for part in found), *rows.shape[1:])
    parts = rows[(0,) * len(shape)].numel() if shape == of_all[: len(shape)] else 1
    _, new, _ = evaluated(subject.batch.parts[0])
    whole = any(map(draws_whole_actions, new))
    if parts == 1 or whole or not _is(found[0], [each.rows.mean() for each in found[0]]):
        return ""
    return (
        f"The closure's KL is averaged over the {parts} numbers of each action, not summed: the "
        f"joint KL is {parts} times as large."
    )


def _doubt(found: list[list[Measured]], subject: ClosureSubject) -> str:
    """Return why the KL may not be that of whole actions, or nothing."""
    _, new, third = evaluated(subject.batch.parts[0])
    for part in found if third else []:  # without a third value, it may be an estimate
        tables = [_averages(each)[0] for each in part]
        if not any(_is(part, [sound[name] for sound in tables]) for name in tables[0]):
            ratios = sorted(each.stated / each.mean for each in part)
            return (
                f"The closure's KL is {ratios[0]:.3g} to {ratios[-1]:.3g} times the mean KL: it "
                "has weights, or is that of a part of each action."
            )
    rows = found[0][0].rows
    if subject.log_prob is not None or subject.mask is not None or rows.dim() < 2:
        return ""
    if any(map(draws_whole_actions, new)):
        return ""
    tables = [_averages(each)[0] for each in found[0]]
    if _is(found[0], [each["mean"] for each in tables]):
        return (
            f"The closure's KL is averaged over {tuple(rows.shape)} numbers. If some dimensions "
            "belong to one action, it is too small: wrap the distribution in Independent."
        )
    if _is(found[0], [each[_TIME_FIRST] for each in tables]) and not _is(
        found[0], [each["of sequences"] for each in tables]
    ):
        return (
            f"The closure's KL is summed over the first of {tuple(rows.shape)} numbers. If these "
            "are the actions, it is too large: sum over the last, and average over the first."
        )
    return ""


def _weights_may_explain(found: list[Measured]) -> bool:
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


def _rough_flaw(found: list[Measured]) -> str:
    ratios = [each.stated / each.mean for each in found]
    if min(ratios) < 3 * _actions_per_sequence(found[0].rows, found[0].mask):
        return ""
    return (
        f"The closure's KL is about {min(ratios):.2g} times what the log-probabilities of the "
        f"{found[0].rows.numel()} actions give: it is summed over the batch, not averaged."
    )


def _actions_per_sequence(rows: Tensor, mask: Tensor | None) -> float:
    """Return how many actions a sequence has, on average; 1 for a batch of single actions."""
    if rows.dim() < 2:
        return 1.0
    counted = torch.ones_like(rows) if mask is None else mask.view(rows.shape).to(rows)
    return float(counted.sum() / counted.flatten(1).any(1).sum())


def _is(found: list[Measured], values: list[Tensor], within: float = _SAME) -> bool:
    """Return whether the closure's KL is a certain average in every direction."""
    pairs = zip(found, values, strict=True)
    return all(math.isclose(each.stated, float(value), rel_tol=within) for each, value in pairs)


def _averages(found: Measured) -> tuple[Mapping[str, Tensor], Mapping[str, Tensor]]:
    """Return what a KL may be, by name, and what it may not be, by what is wrong then."""
    rows, mask = found.rows, found.mask
    count = rows.numel()
    counted = torch.ones_like(rows, dtype=torch.bool) if mask is None else mask.bool()
    inside = rows * counted
    per_row = counted.flatten(1).sum(1) if rows.dim() > 1 else counted
    sound = {"mean": inside.sum() / counted.sum()}
    if rows.dim() > 1:  # a sequence may be one action, whichever dimension comes first
        sound["of sequences"] = inside.sum() / (per_row > 0).sum()
        if not found.actions_first:
            sound[_TIME_FIRST] = inside.sum() / counted.flatten(1).any(0).sum()
        means = inside.flatten(1).sum(1) / per_row.clamp_min(1)
        sound["mean of sequences"] = means.sum() / (per_row > 0).sum()
    faulty = {
        f"The closure's KL is summed over the batch of {count}, not averaged.": rows.sum(),
        f"The closure's KL is summed over the {int(counted.sum())} elements that count, not "
        "averaged.": inside.sum(),
    }
    if not counted.all():
        left_out = f"{int((~counted).sum())} of {count} elements that the mask leaves out"
        faulty[
            f"The closure's KL is averaged over the {left_out}, and over none that count: one of "
            "the two masks is inverted."
        ] = (rows * ~counted).sum() / (~counted).sum()
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
