"""The closures under test: evaluated always from the same state, and moved along the parameters."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor

from trpo_optim.closure.checks import Numbers
from trpo_optim.closure.closures import Closures
from trpo_optim.closure.evaluation import Objective
from trpo_optim.closure.parameters import ParameterVector
from trpo_optim.closure.transaction import Transaction
from trpo_optim.curvature.batch import Batch
from trpo_optim.curvature.engine_choice import learned
from trpo_optim.curvature.first_derivatives import gradient_of
from trpo_optim.testing.clamps import at_bounds

__all__ = ["ClosureSubject", "unit_of"]


@dataclass
class ClosureSubject:
    """The closures of a step, evaluated within a transaction that puts everything back.

    Attributes:
        closures: What is checked.
        vector: The parameters.
        transaction: What puts everything back.
        log_prob: Returns ln π of the batch's actions. None: not known.
        advantages: Of the same actions. None: not known.
        mask: Which elements of the batch count. None: all.
        maximize: Whether the loss is to be raised.
        batch: What evaluates the closures.
    """

    closures: Closures
    vector: ParameterVector
    transaction: Transaction
    log_prob: Callable[[], Tensor] | None
    advantages: Tensor | None
    mask: Tensor | None
    maximize: bool
    batch: Batch = field(init=False)

    def __post_init__(self) -> None:
        """Make what evaluates the closures."""
        self.batch = Batch(self.closures, self.vector, self.transaction, learned({}))

    @property
    def every(self) -> list[Objective]:
        """What evaluates each closure, that of the curvature last."""
        own = [] if self.batch.curvature is None else [self.batch.curvature]
        return [*self.batch.parts, *own]

    def values(self, step: Tensor | None = None) -> Numbers:
        """Return the loss and the mean KL at a step away from the parameters, or at them."""
        with self.at(torch.zeros_like(self.transaction.origin) if step is None else step):
            return self.batch.values()

    def kl(self, step: Tensor | None = None) -> float:
        """Return the mean KL at a step away from the parameters, or at them."""
        return self.values(step).kl

    def loss_gradient(self) -> Tensor:
        """Return the gradient of the loss, (n,)."""
        gradient = torch.zeros_like(self.transaction.origin)
        for weight, part in zip(self.batch.weights, self.batch.parts, strict=True):
            gradient += weight * gradient_of(part.with_graph().loss, part)
        return gradient

    def moved(self, step: Tensor) -> Tensor:
        """Return by how much the parameters move at a step, (n,), in their own precision."""
        ahead = self.transaction.origin + step
        return self.vector.gather(self.vector.scatter(ahead)) - self.transaction.origin

    def direction(self) -> Tensor:
        """Return a fixed move along all parameters that the loss depends on, and no kink."""
        return self.transaction.far_away() * self._moving * ~self.at_bound

    @functools.cached_property
    def at_bound(self) -> Tensor:
        """Which numbers of the vector lie at the bound of a clamp, where the closure has a kink."""
        parts = self.batch.parts if self.vector.fsdp is None else []
        roots = (part.with_graph().loss.grad_fn for part in parts)
        return at_bounds(roots, self.vector, self.vector.leaves)

    @functools.cached_property
    def _moving(self) -> Tensor:
        """Which elements the loss depends on; a parametrization may keep signs beside these."""
        moving = torch.zeros_like(self.transaction.origin, dtype=torch.bool)
        for part in self.batch.parts:
            moving |= gradient_of(part.with_graph().loss, part) != 0
        return moving if moving.any() else torch.ones_like(moving)

    @property
    def cpu_mask(self) -> Tensor | None:
        """The mask, beside the numbers of rows, which are brought to the CPU."""
        return None if self.mask is None else self.mask.cpu()

    @contextmanager
    def at(self, step: Tensor) -> Iterator[None]:
        """Move the parameters by a step, (n,), and put them back."""
        self.transaction.move(step, 1.0)
        try:
            yield
        finally:
            self.transaction.move(torch.zeros_like(step), 1.0)


def unit_of(gradient: Tensor) -> Tensor:
    """Return the unit vector along a gradient, or along all parameters where it gives none."""
    scaled = gradient / gradient.abs().max()  # whose squares neither vanish nor overflow
    if not scaled.isfinite().all():
        scaled = torch.ones_like(gradient)
    unit: Tensor = scaled / scaled.norm()
    return unit
