"""Which rows a closure's KL covers, and by what weight, from slopes by their distributions."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.distributions import Distribution

from trpo_optim.closure.evaluation import Objective
from trpo_optim.distributions import frozen
from trpo_optim.distributions.kl import kl_of_family
from trpo_optim.distributions.parts import tensors
from trpo_optim.errors import TrustRegionError
from trpo_optim.testing.closure_subject import ClosureSubject
from trpo_optim.testing.kl_rows import Measured, behind_kl

__all__ = ["RowWeights", "weights_of_rows"]

_CLEAR = 1e-4
"""The least square of a row's slope that tells of its weight, over the mean of all."""

_SINGLE = 1e-6
"""The unit of rounding of parameters at which no slope that counts is zero."""

_SAME = 0.02
"""By how much weights and slopes may differ that are meant to be the same, relative."""


@dataclass(frozen=True)
class RowWeights:
    """How the KL's slope by the distributions is made up of the slopes of the rows' KLs.

    Attributes:
        covered: How many rows have a slope of loss and of KL.
        missed: How many have one of the loss alone, though their KL changes.
        factor: The sum of all weights if each row has the same one. None: they differ, or the
            closure's KL is not made of the rows' KLs.
    """

    covered: int
    missed: int
    factor: float | None


def weights_of_rows(
    subject: ClosureSubject, found: list[Measured], index: int
) -> RowWeights | None:
    """Look at the KL of a closure at a small move.

    Args:
        subject: The closures.
        found: What was measured of the closure.
        index: Which of the closures it is.

    Returns:
        The weights, or None where autograd does not tell them: the closure may make its KL of other
        distributions than its loss.
    """
    part, measured = subject.batch.parts[index], found[0]
    if measured.step is None or subject.vector.precision > _SINGLE:
        return None
    try:
        old = [frozen(each) for each in behind_kl(part)[1]]
        with subject.at(measured.step), torch.enable_grad():
            return _compared(part, old, measured)
    except (TrustRegionError, RuntimeError):  # a reentrant checkpoint
        return None


def _compared(part: Objective, old: list[Distribution], measured: Measured) -> RowWeights | None:
    values, new = behind_kl(part)
    shape = measured.rows.shape
    inputs = [
        each
        for each in {id(each): each for dist in new for each in tensors(dist)}.values()
        if each.requires_grad and each.shape[: len(shape)] == shape
    ]
    if not inputs or len(old) != len(new):
        return None
    kls = [kl_of_family(*pair, "").sum() for pair in zip(old, new, strict=True)]
    of_loss, of_kl, of_rows = (
        _slopes(value, inputs, len(shape))
        for value in (values.loss, values.kl, sum(kls[1:], kls[0]))
    )
    counted = torch.ones_like(measured.rows) if measured.mask is None else measured.mask
    squares = of_rows.square().sum(1)
    clear = squares > _CLEAR * squares.mean()
    clear &= counted.bool().reshape(-1).to(clear.device)
    alive, moving = (each.ne(0).any(1) & clear for each in (of_kl, of_loss))
    weights = (of_kl * of_rows).sum(1) / squares
    apart = (of_kl - weights[:, None] * of_rows).norm(dim=1) > _SAME * of_kl.norm(dim=1)
    own = weights[clear]
    even = bool(clear.any()) and not bool((apart & clear).any())
    even = even and bool((own - own.mean()).abs().max() <= _SAME * own.mean().abs())
    factor = float(own.mean()) * int(counted.sum()) if even else None
    return RowWeights(int((alive & moving).sum()), int((moving & ~alive).sum()), factor)


def _slopes(value: Tensor, inputs: Iterable[Tensor], dims: int) -> Tensor:
    """Return the slope of a number by what distributions are made of, (rows, ...)."""
    slopes = torch.autograd.grad(
        value, tuple(inputs), allow_unused=True, retain_graph=True, materialize_grads=True
    )
    rows = [each.detach().double().reshape(*each.shape[:dims], -1) for each in slopes]
    return torch.cat([each.flatten(0, dims - 1) for each in rows], 1)
