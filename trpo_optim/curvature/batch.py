"""What one step is taken on: a weighted mean of closures, and curvature from one of its own."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace

import torch
from torch import Tensor

from trpo_optim.closure.checks import Numbers
from trpo_optim.closure.closures import Closures, shares
from trpo_optim.closure.evaluation import Objective
from trpo_optim.closure.lockstep import Lockstep
from trpo_optim.closure.parameters import ParameterVector
from trpo_optim.closure.transaction import Transaction
from trpo_optim.curvature.averages import largest_of, least_of, weighted_mean
from trpo_optim.curvature.engine_choice import EngineChoice
from trpo_optim.curvature.local_model import LocalModel, first_order, slope, without_products
from trpo_optim.curvature.second_order import product_again, refuse, second_order
from trpo_optim.errors import blaming
from trpo_optim.hyperparameters import EngineName
from trpo_optim.report import Engine, StepReport

__all__ = ["Batch"]

_MOST_DOUBTS = 3
"""How often an optimizer compares its products anew. A policy whose KL is far from quadratic within
the radius would give reason to at every step."""


class Batch:
    """What one step is taken on: every quantity is the weighted mean over the closures.

    Of several closures, one at a time holds a graph: it is made again for every product, so that
    memory is that of one. Of a single closure, or of the curvature's own, it is made once.

    Args:
        closures: What ``collected`` returned, with at least one part.
        vector: The parameters.
        transaction: What holds the state that an evaluation may move.
        choices: What earlier steps have learned of the parts and of the curvature's closure.
        engine: What is to make the products.

    Attributes:
        parts: The closures whose mean is taken.
        weights: Their shares, of the sum 1.
        curvature: The closure of the curvature's own, or None.

    Raises:
        TrustRegionError: If a closure cannot be called.
    """

    def __init__(
        self,
        closures: Closures,
        vector: ParameterVector,
        transaction: Transaction,
        choices: Mapping[str, EngineChoice],
        engine: EngineName = "auto",
    ) -> None:
        self.in_step = None
        self._vector = vector
        self._choices = choices
        self._engine = engine
        self._part_engines: list[Engine] = []
        parts = closures.parts
        self.weights = shares(closures.weights or [1.0] * len(parts))
        self.parts: list[Objective] = []
        for index, each in enumerate(parts, start=1):
            name = f"closure {index} of {len(parts)}" if len(parts) > 1 else ""
            with blaming(name):
                self.parts.append(Objective(each, vector, transaction, name))
        self.curvature: Objective | None = None
        if closures.curvature is not None:
            with blaming("curvature"):
                self.curvature = Objective(closures.curvature, vector, transaction, "curvature")

    def sums(self) -> AbstractContextManager[None]:
        """Return what sums over vectors need for the time of a step: nothing."""
        return nullcontext()

    def evaluate_together(self, lockstep: Lockstep, share: float) -> None:
        """Have ``backward()`` add up the gradients of all ranks, which evaluate together.

        Args:
            lockstep: The ranks.
            share: The weight of this rank's closures among those of all ranks.
        """
        own = [] if self.curvature is None else [(1.0, self.curvature)]
        for weight, part in [*zip(self.weights, self.parts, strict=True), *own]:
            part.lockstep, part.share = lockstep, share * weight

    @property
    def evaluations(self) -> int:
        """How often a closure was called, whichever."""
        own = [] if self.curvature is None else [self.curvature]
        return sum(part.evaluations for part in [*self.parts, *own])

    def concluded(self, report: StepReport) -> StepReport:
        """Return the report of the step that was taken on this, its evaluations counted.

        Args:
            report: Without them.
        """
        return replace(report, closure_evaluations=self.evaluations)

    def values(self) -> Numbers:
        """Return the loss and the KL where the parameters now are, without a graph."""
        found = []
        for part in self.parts:
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

    def slope(self) -> tuple[float, Tensor]:
        """Return the KL that gives the curvature, in nats, and its gradient, shape (n,)."""
        own = None if self.curvature is None else [(1.0, self.curvature)]
        total, gradient = 0.0, None
        for weight, part in own or zip(self.weights, self.parts, strict=True):
            with blaming(part.name):
                kl, share = slope(part, loss=own is None)
            total += weight * kl
            share.mul_(_left_of(weight, part))
            gradient = share if gradient is None else gradient.add_(share)
        assert gradient is not None  # there is at least one part
        return total, gradient

    @property
    def curves_apart(self) -> bool:
        """Whether products are taken of another KL than the mean over the parts."""
        return self.curvature is not None

    def kl_of_curvature(self) -> float:
        """Return the KL that products are taken of, in nats, where the parameters now are."""
        if self.curvature is None:
            return self.values().kl
        with blaming("curvature"):
            return self.curvature.values().kl

    def is_unproven(self) -> bool:
        """Return whether products are yet to be compared with finite differences."""
        choice = self._choice
        doubtful = bool(choice["flaw"]) and self._engine != "auto"
        undecided = choice["smooth"] is None and self.prefers_differences()
        return not choice["proven"] or doubtful or undecided

    def prefers_differences(self) -> bool:
        """Return whether finite differences are to serve where the KL is smooth."""
        others = self._vector.fsdp is None  # else no other engine serves
        wanted = self._engine == "auto" and bool(self._dear()) and not self._choice["flaw"]
        return others and wanted

    def prove(self, flaw: str, *, smooth: bool | None) -> None:
        """Note that products have been compared with finite differences.

        Args:
            flaw: Why finite differences are to serve in all further steps, or empty.
            smooth: Whether finite differences agreed, where they are preferred; else None.

        Raises:
            TrustRegionError: If there is a flaw in what an engine makes that the user named.
        """
        if flaw and self._engine != "auto":
            refuse(self._engine, flaw)
        if self._engine == "finite differences":
            return  # there was nothing to compare them with
        self._choice["proven"] = True
        self._choice["smooth"] = self._choice["smooth"] if smooth is None else smooth
        self._choice["flaw"] = flaw or self._choice["flaw"]

    def one_side_serves(self) -> bool:
        """Return whether finite differences may look at one side alone."""
        return bool(self._choice["one_sided"])

    def learn_sides(self, *, one_serves: bool) -> None:
        """Note what a step found of both sides, or of one.

        Args:
            one_serves: Whether further steps may look at one side alone.
        """
        self._choice["one_sided"] = one_serves

    def _dear(self) -> str:
        """Return what makes exact products dear, or empty."""
        if self.curvature is None and len(self.parts) > 1:
            return "micro-batches"
        return self._choice["dear"]

    def doubt(self) -> None:
        """Have the next step compare products with finite differences, a few times in all."""
        if self._choice["doubts"] < _MOST_DOUBTS:
            self._choice["doubts"] += 1
            self._choice["proven"] = False
            self._choice["smooth"] = self._choice["one_sided"] = None

    @property
    def _choice(self) -> EngineChoice:
        """What is known of the closures that give the curvature."""
        return self._choices["parts" if self.curvature is None else "curvature"]

    def first_order(self) -> LocalModel:
        """Return the local model without curvature."""
        return self._linearized(first_order)

    def second_order(self) -> LocalModel:
        """Return the local model with Fisher-vector products."""
        if self.curvature is not None:
            model = self._linearized(functools.partial(first_order, curved=True))
            with blaming("curvature"):
                other = self._modelled(self.curvature, gradient=False)
            return replace(
                model,
                product=other.product,
                kls={**model.kls, **other.kls},
                precision=max(model.precision, other.precision),
                engine=other.engine,
                fallback=other.fallback,
            )
        if len(self.parts) == 1:
            with blaming(self.parts[0].name):
                return self._modelled(self.parts[0])
        self._part_engines = []
        return replace(self._linearized(self._modelled), product=self._remade_product)

    def _modelled(self, objective: Objective, *, gradient: bool = True) -> LocalModel:
        """Return the model of a closure that gives the curvature."""
        choice = self._choice
        if choice["smooth"] and self.prefers_differences():
            reason = f"finite differences are cheaper than exact products for {self._dear()}"
            model = without_products(objective, reason, gradient=gradient)
            choice["dear"] = objective.dear  # what was known may be of another closure
            if self.prefers_differences():
                return model
        model = second_order(objective, choice, engine=self._engine, gradient=gradient)
        self._part_engines.append(model.engine)
        return model

    def _linearized(self, order: Callable[[Objective], LocalModel]) -> LocalModel:
        """Return the mean of the parts' models, without products."""
        losses, kls, largest, gradient = [], dict[str, float](), [], None
        engines: list[tuple[Engine, str]] = []
        resolutions, precisions = list[float](), list[float]()
        for part, weight in zip(self.parts, self.weights, strict=True):
            with blaming(part.name):
                model = order(part).released()
            losses.append(model.loss)
            kls |= model.kls
            largest.append(model.largest_kl)
            engines.append((model.engine, model.fallback))
            resolutions.append(model.kl_resolution)
            precisions.append(model.precision)
            share = model.gradient.mul_(_left_of(weight, part))
            gradient = share if gradient is None else gradient.add_(share)
        assert gradient is not None  # there is at least one part
        engine, fallback = least_of(engines)
        return replace(
            model,
            loss=self._mean(losses),
            kl=self._mean(list(kls.values())),
            largest_kl=largest_of(largest),
            kl_resolution=max(resolutions),
            precision=max(precisions),
            kls=kls,
            gradient=gradient,
            engine=engine,
            fallback=fallback,
        )

    def _remade_product(self, direction: Tensor) -> Tensor:
        """Return Fv, the graph of each part made for it and dropped again."""
        total = torch.zeros_like(direction)
        parts = zip(self.parts, self.weights, self._part_engines, strict=True)
        for part, weight, engine in parts:
            with blaming(part.name):
                total.add_(product_again(part, engine)(direction), alpha=weight)
        return total

    def _mean(self, values: Sequence[float]) -> float:
        return weighted_mean(self.weights, values)


def _left_of(weight: float, part: Objective) -> float:
    """Return by what a gradient is still to be weighted."""
    return weight if part.share is None else 1.0
