"""Faults of every kind at every call, in every mode and engine: no state is lost."""

from __future__ import annotations

import math
import os
import random
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from faulty_closures import batch_norm_problem, plain_problem
from problems import MODES, Problem, Snapshot
from profiles import problems
from torch import Tensor

from trpo_optim.curvature.engine_choice import learned

pytestmark = pytest.mark.no_cover

EXCEPTIONS: list[type[BaseException]] = [
    RuntimeError,
    ValueError,
    TypeError,
    KeyError,
    AssertionError,
    StopIteration,
    MemoryError,
    torch.OutOfMemoryError,
    torch.linalg.LinAlgError,  # type: ignore[attr-defined]  # documented, not in __all__
    KeyboardInterrupt,
    SystemExit,
    GeneratorExit,
]

Values = tuple[Tensor, Tensor]

NUMBERS: dict[str, Callable[[Tensor, Tensor, Tensor], Values]] = {
    "loss NaN": lambda loss, kl, weight: (loss * math.nan, kl),
    "loss +inf": lambda loss, kl, weight: (loss + math.inf, kl),
    "loss -inf": lambda loss, kl, weight: (loss - math.inf, kl),
    "kl NaN": lambda loss, kl, weight: (loss, kl * math.nan),
    "kl +inf": lambda loss, kl, weight: (loss, kl + math.inf),
    "gradient NaN": lambda loss, kl, weight: (loss + (0 * weight).sum().sqrt(), kl),
    "kl's gradient NaN": lambda loss, kl, weight: (loss, kl + (0 * weight).sum().sqrt()),
    "kl above every radius": lambda loss, kl, weight: (loss, kl + 100),
    "kl negative": lambda loss, kl, weight: (loss, -kl),
    "loss worse": lambda loss, kl, weight: (loss + 100, kl),
    "one value": lambda loss, kl, weight: loss,  # type: ignore[dict-item, return-value]  # a fault
    "a vector": lambda loss, kl, weight: (loss.expand(3), kl),
    "detached": lambda loss, kl, weight: (loss.detach(), kl.detach()),
    "no tensor": lambda loss, kl, weight: (loss.item(), kl),  # type: ignore[dict-item, return-value]  # a fault
}

ENGINES = ["Gauss-Newton", "torch.func", "double backward", "finite differences"]


@dataclass(frozen=True)
class Fault:
    """What goes wrong, and where."""

    kind: type[BaseException] | str
    call: int
    mode: str
    engine: str
    parts: int
    first: bool

    @classmethod
    def drawn(cls, source: random.Random) -> Fault:
        """Draw one of all."""
        kinds: list[type[BaseException] | str] = [*EXCEPTIONS, *NUMBERS]
        return cls(
            kind=source.choice(kinds),
            call=source.randint(1, 12),
            mode=source.choice(list(MODES)),
            engine=source.choice(ENGINES),
            parts=source.choice([1, 1, 2, 3]),
            first=source.random() < 0.5,
        )

    def problem(self) -> Problem:
        """Return a problem that the engine serves."""
        return plain_problem() if self.engine == "torch.func" else batch_norm_problem()


class Closure:
    """Evaluates a problem, and goes wrong at one of all calls of a step."""

    calls = 0

    def __init__(self, problem: Problem, fault: Fault) -> None:
        self.problem = problem
        self.fault = fault

    def __call__(self) -> Any:
        self.calls += 1
        loss, kl, dist = self.problem.closure_with_dist()
        if self.calls == self.fault.call:
            if not isinstance(self.fault.kind, str):
                raise self.fault.kind("injected")
            weight = self.problem.parameters()[0]
            values: Any = NUMBERS[self.fault.kind](loss, kl, weight)
            return values
        return (loss, kl, dist) if self.fault.engine == "Gauss-Newton" else (loss, kl)


def losses(fault: Fault) -> list[str]:
    """Take a step with a fault; return what was lost, by name."""
    problem = fault.problem()
    make = problem.optimizer if fault.first else problem.proven_optimizer
    optimizer = make(mode=fault.mode, damping=1e-3, max_kl=0.05, cg_iterations=3)
    if fault.engine == "finite differences":
        for choice in learned(optimizer.param_groups[0]).values():
            choice["flaw"] = "it is tried"
    settings = [(name, value) for name, value in optimizer.defaults.items()]
    closure = Closure(problem, fault)
    before = Snapshot.of(problem.policy)
    accepted = False
    try:
        report = optimizer.step([closure] * fault.parts if fault.parts > 1 else closure)
        accepted = report.accepted
    except BaseException as error:
        if not (isinstance(error, ValueError) or "injected" in str(error)):
            raise
    lost = before.differences(Snapshot.of(problem.policy))
    names = {name for name, _ in problem.policy.named_parameters()}
    if accepted:
        lost = [name for name in lost if name not in names]
    if [(name, optimizer.param_groups[0][name]) for name, _ in settings] != settings:
        lost.append("hyperparameters")
    return lost


@pytest.mark.filterwarnings("ignore:std\\(\\)")
@pytest.mark.timeout(3000)
def test_no_state_is_lost_whatever_goes_wrong() -> None:
    seed = int(os.environ["RANDOM_SEED"])
    source = random.Random(seed)
    count = 10 * problems() if problems() > 100 else 2 * problems()
    for _ in range(count):
        fault = Fault.drawn(source)
        assert losses(fault) == [], (seed, fault)
