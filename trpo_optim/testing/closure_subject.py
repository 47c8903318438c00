"""The closure under test: evaluated always from the same state, and moved along its parameters."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor

from trpo_optim.closure.evaluation import Closure, Objective
from trpo_optim.closure.parameters import ParameterVector
from trpo_optim.closure.transaction import Transaction

__all__ = ["ClosureSubject"]


@dataclass
class ClosureSubject:
    """A closure, evaluated within a transaction that puts everything back.

    Attributes:
        closure: What is checked.
        vector: The parameters.
        transaction: What puts everything back.
        log_prob: Returns ln π of the batch's actions. None: not known.
        advantages: Of the same actions. None: not known.
        mask: Which elements of the batch count. None: all.
        maximize: Whether the loss is to be raised.
    """

    closure: Closure
    vector: ParameterVector
    transaction: Transaction
    log_prob: Callable[[], Tensor] | None
    advantages: Tensor | None
    mask: Tensor | None
    maximize: bool
    objective: Objective = field(init=False)

    def __post_init__(self) -> None:
        """Make what evaluates the closure."""
        self.objective = Objective(self.closure, self.vector, self.transaction)

    def kl(self, step: Tensor | None = None) -> float:
        """Return the KL at a step away from the parameters, or at them."""
        nowhere = torch.zeros_like(self.transaction.origin)
        self.transaction.move(nowhere if step is None else step, 1.0)
        try:
            return self.objective.values().kl
        finally:
            self.transaction.move(nowhere, 1.0)

    def direction(self) -> Tensor:
        """Return a fixed move along all parameters."""
        return self.transaction.far_away()

    @contextmanager
    def at(self, step: Tensor) -> Iterator[None]:
        """Move the parameters by a step, (n,), and put them back."""
        self.transaction.move(step, 1.0)
        try:
            yield
        finally:
            self.transaction.move(torch.zeros_like(step), 1.0)
