"""The closures of one step as one: a weighted mean, and curvature from a closure of its own."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from trpo_optim.closure import Closure, Objective
from trpo_optim.closure_checks import Numbers, blaming, checked_values
from trpo_optim.curvature import LocalModel, first_order, second_order
from trpo_optim.parameter_vector import ParameterVector
from trpo_optim.report import TrustRegionError
from trpo_optim.transaction import Transaction

__all__ = ["Batch", "Closures"]


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
        shares = _shares(self.weights, len(self.parts))
        values = [checked_values(part()) for part in self.parts]
        loss = torch.stack([s * each.loss for s, each in zip(shares, values, strict=True)]).sum()
        kl = torch.stack([s * each.kl for s, each in zip(shares, values, strict=True)]).sum()
        return loss, kl


class Batch:
    """What one step is taken on: every quantity is the weighted mean over the closures.

    Of several closures, one at a time holds a graph: it is made again for every product, so that
    memory is that of one. Of a single closure, or of the curvature's own, it is made once.

    Args:
        closures: One closure, or several of which each evaluates a micro-batch.
        weights: The share of each, up to a common factor; None for equal shares.
        curvature: The closure whose KL gives the Fisher-vector products; None for the mean's own.
        vector: The parameters.
        transaction: What holds the state that an evaluation may move.

    Raises:
        TrustRegionError: If a closure cannot be called, or the weights do not fit the closures.
    """

    def __init__(
        self,
        closures: Closure | Iterable[Closure] | None,
        weights: Iterable[float] | None,
        curvature: Closure | None,
        vector: ParameterVector,
        transaction: Transaction,
    ) -> None:
        several = isinstance(closures, Iterable) and not (
            callable(closures) or isinstance(closures, str)
        )
        given: list[Any] = list(closures) if several else [closures]  # type: ignore[arg-type]  # as just tested
        if several and any(isinstance(each, Tensor) for each in given):
            raise TrustRegionError(
                "step() got what a closure returned. Pass the closure itself: step(closure), not "
                "step(closure())."
            )
        self._weights = _shares(weights, len(given) if several else None)
        self._parts: list[Objective] = []
        for index, each in enumerate(given, start=1):
            name = f"closure {index} of {len(given)}" if several else ""
            with blaming(name):
                self._parts.append(Objective(each, vector, transaction, name))
        self._curvature = None
        if curvature is not None:
            with blaming("curvature"):
                self._curvature = Objective(curvature, vector, transaction, "curvature")

    @property
    def evaluations(self) -> int:
        """How often a closure was called, whichever."""
        own = [] if self._curvature is None else [self._curvature]
        return sum(part.evaluations for part in [*self._parts, *own])

    def values(self) -> Numbers:
        """Return the loss and the KL where the parameters now are, without a graph."""
        found = []
        for part in self._parts:
            with blaming(part.name):
                found.append(part.values())
        losses, kls, largest = zip(*found, strict=True)
        return Numbers(self._mean(losses), self._mean(kls), _largest(largest))

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
            largest_kl=_largest(largest),
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
        return sum(weight * value for weight, value in zip(self._weights, values, strict=True))


def _largest(kls: Sequence[float | None]) -> float | None:
    """Return the largest of the parts' largest KLs; None where one does not know its own."""
    known = [kl for kl in kls if kl is not None]
    if len(known) < len(kls):
        return None
    return math.nan if any(map(math.isnan, known)) else max(known)


def _shares(weights: Iterable[float] | None, count: int | None) -> list[float]:
    """Return the weights scaled to a sum of one, for ``count`` closures, or for a single one."""
    if count is None:
        if weights is not None:
            raise TrustRegionError(
                f"weights is {weights!r}, and there is a single closure. Weights belong to a list "
                "of closures; leave them out."
            )
        return [1.0]
    if count == 0:
        raise TrustRegionError(
            "step() got an empty list of closures. Pass at least one, each for its micro-batch."
        )
    given = [1.0] * count if weights is None else weights
    try:
        plain = [float(weight) for weight in given]
    except (TypeError, ValueError) as error:
        raise TrustRegionError(
            f"weights is {weights!r}; it must hold one number per closure: the number of samples "
            "that its means are over."
        ) from error
    if len(plain) != count:
        raise TrustRegionError(
            f"There are {count} closures and {len(plain)} weights. Give one weight per closure: "
            "the number of samples that its means are over."
        )
    for weight in plain:
        if not (math.isfinite(weight) and weight > 0):
            raise TrustRegionError(
                f"weights holds {weight!r}; each must be a finite number above 0, the number of "
                "samples that a closure's means are over."
            )
    largest = max(plain)
    total = math.fsum(weight / largest for weight in plain)
    return [weight / largest / total for weight in plain]
