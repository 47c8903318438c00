"""The batches of all ranks as one: every quantity is the mean over the samples of all."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from torch import Tensor

from trpo_optim.closure.checks import Numbers
from trpo_optim.closure.closures import shares
from trpo_optim.closure.parameters import ParameterVector
from trpo_optim.curvature.averages import largest_of, least_of, weighted_mean
from trpo_optim.curvature.batch import Batch
from trpo_optim.curvature.local_model import LocalModel
from trpo_optim.distributed.collectives import Reduction
from trpo_optim.distributed.consistency import Ready, agreed, checksum, fingerprint, odd_ones
from trpo_optim.distributed.fsdp import RanksInStep, require_fine
from trpo_optim.errors import RankError
from trpo_optim.long_vectors import in_parts
from trpo_optim.report import Engine, StepReport

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

__all__ = ["SharedBatch", "prepared"]

_UNKNOWN = -math.inf
"""Stands for a largest KL that a closure did not say."""


def prepared(
    prepare: Callable[[], Ready], group: ProcessGroup | None, param_groups: list[dict[str, Any]]
) -> tuple[Ready, Batch | SharedBatch]:
    """Return what this process steps with, and the batch of all processes that step with it.

    Args:
        prepare: Makes this process ready. It may raise.
        group: The processes that step together. None: this process alone.
        param_groups: The optimizer's, with the parameters on one device.

    Raises:
        RankError: If the ranks may not take one step together.
    """
    if group is None:
        ready = prepare()
        assert ready.batch is not None  # as collected requires
        return ready, ready.batch
    first = next(each for group in param_groups for each in group["params"])
    reduction = Reduction(group, first.device)
    ready, weights = agreed(reduction, prepare)
    return ready, SharedBatch(ready.batch, weights, ready.vector, reduction)


class SharedBatch:
    """What one step is taken on, of which every rank has a part; used as ``Batch`` is.

    Whatever it returns or raises, it does so on all ranks: numbers are the same bit for bit, and an
    exception on one rank is an error on all others.

    Args:
        own: This rank's part, or None where it has no samples.
        weights: How many samples each rank has, in their order.
        vector: The parameters.
        reduction: The collectives.

    Attributes:
        in_step: Keeps the ranks in step while FSDP sends between them; None without FSDP.
        curves_apart: Whether some rank takes products of another KL than its batch's. It is known
            after ``second_order()``.
    """

    def __init__(
        self,
        own: Batch | None,
        weights: Sequence[float],
        vector: ParameterVector,
        reduction: Reduction,
    ) -> None:
        self._shares = shares(weights)
        self._present = [rank for rank, weight in enumerate(weights) if weight > 0]
        self._own = own
        self._vector = vector
        self._reduction = reduction
        self._unproven = self._prefers_differences = False
        self._one_side_serves = self.curves_apart = False
        self.in_step = RanksInStep(reduction) if vector.fsdp else None
        if self.in_step is not None and own is not None:
            own.evaluate_together(self.in_step, self._shares[reduction.rank])

    def sums(self) -> AbstractContextManager[None]:
        """Return what sums over vectors need for the time of a step."""
        if self._vector.fsdp is None:
            return nullcontext()
        reduction = self._reduction  # of vectors of which each rank has its own part
        return in_parts(reduction.add_up, reduction.each, self._vector.whole_length)

    def values(self) -> Numbers:
        """Return the loss and the KL where the parameters now are, without a graph."""

        def work() -> list[float]:
            return [0.0] * 3 if self._own is None else _row(self._own.values())

        rows = self._reduction.rows(work, 3)
        losses, kls, largest = zip(*(rows[rank] for rank in self._present), strict=True)
        return Numbers(self._mean(losses), self._mean(kls), _largest(largest))

    def probe(self) -> Numbers | None:
        """Return the values where the parameters now are, or None if a closure raises there.

        Raises:
            RankError: If a rank was lost.
        """
        try:
            return self.values()
        except Exception as error:  # what a sound closure makes of a point no step goes to
            if isinstance(error, RankError) and error.lost:
                raise
            return None

    def slope(self) -> tuple[float, Tensor]:
        """Return the KL that gives the curvature, in nats, and its gradient, shape (n,)."""
        found = 0.0

        def work() -> Tensor | None:
            nonlocal found
            if self._own is None:
                return None
            found, gradient = self._own.slope()
            return gradient

        gradient = self._total(work)
        return self._mean(self._of_present(lambda: found)), gradient

    def kl_of_curvature(self) -> float:
        """Return the KL that products are taken of, in nats, where the parameters now are."""
        own = self._own
        absent = 0.0  # of a rank without samples, which does not count
        return self._mean(
            self._of_present(lambda: absent if own is None else own.kl_of_curvature())
        )

    def is_unproven(self) -> bool:
        """Return whether products are yet to be compared with finite differences."""
        return self._unproven

    def prefers_differences(self) -> bool:
        """Return whether finite differences are to serve where the KL is smooth."""
        return self._prefers_differences

    def prove(self, flaw: str, *, smooth: bool | None) -> None:
        """Note what a comparison with finite differences found, as ``Batch.prove`` does."""
        if self._own is not None:
            self._own.prove(flaw, smooth=smooth)

    def one_side_serves(self) -> bool:
        """Return whether finite differences may look at one side alone."""
        return self._one_side_serves

    def learn_sides(self, *, one_serves: bool) -> None:
        """Note whether further steps may look at one side alone."""
        if self._own is not None:
            self._own.learn_sides(one_serves=one_serves)

    def doubt(self) -> None:
        """Have the next step compare products with finite differences."""
        if self._own is not None:
            self._own.doubt()

    def first_order(self) -> LocalModel:
        """Return the local model without curvature."""
        return self._linearized(Batch.first_order)

    def second_order(self) -> LocalModel:
        """Return the local model with Fisher-vector products."""
        model = self._linearized(Batch.second_order)
        if self._vector.fsdp:
            require_fine(model.precision)
        return model

    def concluded(self, report: StepReport) -> StepReport:
        """Check that the step came to the same on all ranks, the last thing before it is kept.

        Args:
            report: This rank's.

        Returns:
            The report, with the evaluations of the rank that called most.

        Raises:
            RankError: If it did not.
        """
        evaluations = 0 if self._own is None else self._own.evaluations

        def work() -> list[float]:
            whole = report.accepted and not self._vector.fsdp
            ends = fingerprint(self._vector.current()) if whole else (0.0, 0.0)
            return [evaluations, checksum(repr(report)), *ends]

        rows = self._reduction.rows(work, 4)
        if others := odd_ones([tuple(row[1:]) for row in rows]):
            raise RankError(
                f"The result of the step on {self._reduction.name(others[0])} differs from the "
                "other ranks. The step was withdrawn on all ranks. Run every rank on the same type "
                "of machine, with the same torch and number of threads."
            )
        return replace(report, closure_evaluations=int(max(row[0] for row in rows)))

    def _linearized(self, order: Callable[[Batch], LocalModel]) -> LocalModel:
        own: LocalModel | None = None

        def work() -> list[float]:
            nonlocal own
            if self._own is None:
                return [0.0] * 11
            own = order(self._own)
            said = checksum(f"{own.engine}: {own.fallback}")
            values = Numbers(own.loss, own.kl, own.largest_kl)
            numbers = [own.kl_resolution, own.precision, said]
            flags = [
                self._own.is_unproven(),
                self._own.prefers_differences(),
                self._own.one_side_serves(),
                self._own.curves_apart,
            ]
            return [*_row(values), _furthest(own.kls.values()), *numbers, *flags]

        rows = self._reduction.rows(work, 11)
        present = [rows[rank] for rank in self._present]
        columns = zip(*present, strict=True)
        losses, kls, largest, furthest, resolutions, precisions, said, *flags = columns
        unproven, prefers, one_side_serves, curved = flags
        self._unproven, self._prefers_differences = any(unproven), any(prefers)
        self._one_side_serves, self.curves_apart = all(one_side_serves), any(curved)
        engine, fallback = self._said(own, alike=len(present) == len(rows) and len(set(said)) == 1)
        names = [f"the closure of {self._reduction.name(rank)}" for rank in self._present]
        return LocalModel(
            loss=self._mean(losses),
            kl=self._mean(kls),
            largest_kl=_largest(largest),
            kl_resolution=max(resolutions),
            precision=max(precisions),
            gradient=self._total(lambda: None if own is None else own.gradient),
            product=lambda vector: self._total(
                lambda: None if own is None else own.product(vector)
            ),
            engine=engine,
            kls=dict(zip(names, furthest, strict=True)),
            fallback=fallback,
        )

    def _said(self, own: LocalModel | None, *, alike: bool) -> tuple[Engine, str]:
        """Return the last resort among the engines of all ranks, with its reason."""
        if own is not None and alike:
            return own.engine, own.fallback
        texts = self._reduction.texts("" if own is None else json.dumps([own.engine, own.fallback]))
        return least_of([tuple(json.loads(text)) for text in texts if text])

    def _total(self, work: Callable[[], Tensor | None]) -> Tensor:
        if self._vector.fsdp:  # FSDP has added up what the ranks have weighted
            return self._reduction.same(lambda: _made(work()))
        share = self._shares[self._reduction.rank]

        def weighted() -> Tensor | None:
            own = work()
            return None if own is None else own * share

        return self._reduction.total(weighted, len(self._vector), self._vector.dtype)

    def _of_present(self, work: Callable[[], float]) -> list[float]:
        rows = self._reduction.rows(lambda: [work()], 1)
        return [rows[rank][0] for rank in self._present]

    def _mean(self, values: Sequence[float]) -> float:
        return weighted_mean([self._shares[rank] for rank in self._present], values)


def _made(vector: Tensor | None) -> Tensor:
    assert vector is not None  # as require_closures requires
    return vector


def _row(values: Numbers) -> list[float]:
    return [values.loss, values.kl, _UNKNOWN if values.largest_kl is None else values.largest_kl]


def _largest(kls: Sequence[float]) -> float | None:
    return largest_of([None if kl == _UNKNOWN else kl for kl in kls])


def _furthest(kls: Iterable[float]) -> float:
    """Return the KL furthest from zero among those that are numbers."""
    return max((kl for kl in kls if math.isfinite(kl)), key=abs, default=0.0)
