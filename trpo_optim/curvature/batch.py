"""The closures of one step as one: a weighted mean, and curvature from a closure of its own."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from trpo_optim.closure.checks import Numbers, checked_values
from trpo_optim.closure.evaluation import Closure, Objective
from trpo_optim.closure.parameters import ParameterVector
from trpo_optim.closure.transaction import Transaction
from trpo_optim.curvature.local_model import LocalModel, first_order, second_order
from trpo_optim.errors import TrustRegionError, blaming
from trpo_optim.report import StepReport

__all__ = ["Batch", "Closures", "collected", "largest_of", "shares", "weighted_mean"]


@dataclass(frozen=True)
class Closures:
    """All that one step is taken on, as one value: what ``step`` takes in place of a closure.

    Called, it evaluates all parts and returns their weighted mean, without a third value where
    there are several.

    Attributes:
        parts: One closure, or several of which each evaluates a micro-batch.
        weights: The share of each, up to a common factor; None for equal shares.
        curvature: The closure whose KL gives the Fisher-vector products; None for the parts'.
    """

    parts: Sequence[Closure]
    weights: Sequence[float] | None = None
    curvature: Closure | None = None

    def __call__(self) -> tuple[Tensor, Tensor] | tuple[Tensor, Tensor, Any]:
        """Return loss and KL of the whole."""
        if len(self.parts) == 1:
            return self.parts[0]()
        values = [checked_values(part()) for part in self.parts]
        each = list(zip(shares(_plain(self.weights, len(self.parts))), values, strict=True))
        loss = torch.stack([share * part.loss for share, part in each]).sum()
        kl = torch.stack([share * part.kl for share, part in each]).sum()
        return loss, kl


class Batch:
    """What one step is taken on: every quantity is the weighted mean over the closures.

    Of several closures, one at a time holds a graph: it is made again for every product, so that
    memory is that of one. Of a single closure, or of the curvature's own, it is made once.

    Args:
        closures: What ``collected`` returned, with at least one part.
        vector: The parameters.
        transaction: What holds the state that an evaluation may move.

    Raises:
        TrustRegionError: If a closure cannot be called.
    """

    def __init__(
        self, closures: Closures, vector: ParameterVector, transaction: Transaction
    ) -> None:
        parts = closures.parts
        self._weights = shares(closures.weights or [1.0] * len(parts))
        self._parts: list[Objective] = []
        for index, each in enumerate(parts, start=1):
            name = f"closure {index} of {len(parts)}" if len(parts) > 1 else ""
            with blaming(name):
                self._parts.append(Objective(each, vector, transaction, name))
        self._curvature = None
        if closures.curvature is not None:
            with blaming("curvature"):
                self._curvature = Objective(closures.curvature, vector, transaction, "curvature")

    @property
    def evaluations(self) -> int:
        """How often a closure was called, whichever."""
        own = [] if self._curvature is None else [self._curvature]
        return sum(part.evaluations for part in [*self._parts, *own])

    def concluded(self, report: StepReport) -> StepReport:
        """Return the report of the step that was taken on this, its evaluations counted.

        Args:
            report: Without them.
        """
        return replace(report, closure_evaluations=self.evaluations)

    def values(self) -> Numbers:
        """Return the loss and the KL where the parameters now are, without a graph."""
        found = []
        for part in self._parts:
            with blaming(part.name):
                found.append(part.values())
        losses, kls, largest = zip(*found, strict=True)
        return Numbers(self._mean(losses), self._mean(kls), largest_of(largest))

    def probe(self) -> Numbers | None:
        """Return the values where the parameters now are, or None if the closure raises there."""
        try:
            return self.values()
        except Exception:  # what a sound closure makes of a point no step goes to
            return None

    def first_order(self) -> LocalModel:
        """Return the local model without curvature."""
        return self._linearized(first_order)

    def second_order(self) -> LocalModel:
        """Return the local model with Fisher-vector products."""
        if self._curvature is not None:
            model = self._linearized(first_order)
            with blaming("curvature"):
                other = second_order(self._curvature, gradient=False)
            return replace(
                model,
                product=other.product,
                kls={**model.kls, **other.kls},
                engine=other.engine,
                fallback=other.fallback,
            )
        if len(self._parts) == 1:
            with blaming(self._parts[0].name):
                return second_order(self._parts[0])
        return replace(self._linearized(second_order), product=self._remade_product)

    def _linearized(self, order: Callable[[Objective], LocalModel]) -> LocalModel:
        """Return the mean of the parts' models, without products."""
        losses, kls, largest, gradient = [], dict[str, float](), [], None
        engines, fallbacks, resolutions = dict[str, None](), [], []
        for part, weight in zip(self._parts, self._weights, strict=True):
            with blaming(part.name):
                model = order(part).released()
            losses.append(model.loss)
            kls |= model.kls
            largest.append(model.largest_kl)
            engines[model.engine] = None
            fallbacks.append(model.fallback)
            resolutions.append(model.kl_resolution)
            share = model.gradient.mul_(weight)
            gradient = share if gradient is None else gradient.add_(share)
        assert gradient is not None  # there is at least one part
        return replace(
            model,
            loss=self._mean(losses),
            kl=self._mean(list(kls.values())),
            largest_kl=largest_of(largest),
            kl_resolution=max(resolutions),
            kls=kls,
            gradient=gradient,
            engine=" and ".join(engines),
            fallback=next(filter(None, fallbacks), ""),
        )

    def _remade_product(self, direction: Tensor) -> Tensor:
        """Return Fv, the graph of each part made for it and dropped again."""
        total = torch.zeros_like(direction)
        for part, weight in zip(self._parts, self._weights, strict=True):
            with blaming(part.name):
                total.add_(second_order(part, gradient=False).product(direction), alpha=weight)
        return total

    def _mean(self, values: Sequence[float]) -> float:
        return weighted_mean(self._weights, values)


def shares(weights: Sequence[float]) -> list[float]:
    """Return weights scaled to a sum of one.

    Args:
        weights: At least 0, not all of them 0.
    """
    largest = max(weights)
    total = math.fsum(weight / largest for weight in weights)
    return [weight / largest / total for weight in weights]


def weighted_mean(parts: Sequence[float], values: Sequence[float]) -> float:
    """Return the mean of values, given the share of each.

    Args:
        parts: Their shares, of the sum 1.
        values: As many.
    """
    return sum(part * value for part, value in zip(parts, values, strict=True))


def largest_of(kls: Sequence[float | None]) -> float | None:
    """Return the largest of several largest KLs; None where one of them is not known.

    Args:
        kls: In nats.
    """
    known = [kl for kl in kls if kl is not None]
    if len(known) < len(kls):
        return None
    return math.nan if any(map(math.isnan, known)) else max(known)


def collected(
    closure: Closure | Closures | Iterable[Closure] | None,
    weights: Iterable[float] | float | None,
    curvature: Closure | None,
    *,
    shared: bool,
) -> Closures:
    """Return the arguments of ``step`` as one value, in one form.

    Args:
        closure: One, several of which each evaluates a micro-batch, or all of it.
        weights: The share of each, up to a common factor: a number for one closure, a list for
            several; None for equal shares.
        curvature: The closure whose KL gives the Fisher-vector products; None for the mean's own.
        shared: Whether other ranks have a part in the step, so that this one may be without
            samples. A closure of weight 0 is then left out.

    Raises:
        TrustRegionError: If the arguments do not fit together.
    """
    if isinstance(closure, Closures):
        if curvature is not None or weights is not None:
            raise TrustRegionError(
                "step() got Closures, which have their own curvature and weights, and another of "
                "these. Leave it out."
            )
        curvature, weights = closure.curvature, closure.weights
        parts: list[Any] = list(closure.parts)
    elif isinstance(closure, Iterable) and not (callable(closure) or isinstance(closure, str)):
        parts = list(closure)
        weights = [] if _is_number(weights) and not parts and weights == 0 else weights
    else:
        parts = [closure]
        weights = [weights] if _is_number(weights) else weights  # type: ignore[list-item]  # as checked
    if any(isinstance(each, Tensor) for each in parts):
        raise TrustRegionError(
            "step() got what a closure returned. Pass the closure itself: step(closure), not "
            "step(closure())."
        )
    if not (parts or shared):
        raise TrustRegionError(
            "step() got an empty list of closures. Pass at least one, each for its micro-batch."
        )
    if weights is None:
        return Closures(parts, None, curvature)
    plain = _plain(weights, len(parts), least="at least" if shared else "above")
    kept = [index for index, weight in enumerate(plain) if weight > 0]
    return Closures([parts[index] for index in kept], [plain[index] for index in kept], curvature)


def _is_number(weights: Any) -> bool:
    """Whether the argument is a single weight, of whatever type."""
    one = not isinstance(weights, Iterable) or getattr(weights, "ndim", 1) == 0
    return one and weights is not None


def _plain(
    weights: Iterable[float] | float | None, count: int, *, least: str = "above"
) -> list[float]:
    """Return the weights of ``count`` closures as finite numbers ``least`` 0."""
    given: Any = [1.0] * count if weights is None else weights
    try:
        plain = [float(weight) for weight in given]
    except (TypeError, ValueError) as error:
        raise TrustRegionError(
            f"weights is {weights!r}; it must hold one number per closure: the number of samples "
            "that its means are over."
        ) from error
    if len(plain) != count:
        raise TrustRegionError(
            f"There {'is 1 closure' if count == 1 else f'are {count} closures'} and {len(plain)} "
            "weights. Give one weight per closure: the number of samples that its means are over."
        )
    for weight in plain:
        if not math.isfinite(weight) or weight < 0 or (weight == 0 and least == "above"):
            raise TrustRegionError(
                f"weights holds {weight!r}; each must be a finite number {least} 0, the number of "
                "samples that a closure's means are over."
            )
    return plain
