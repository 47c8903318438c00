"""check_closure: whether a trust region can be built on what a handwritten closure returns."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.optim.optimizer import ParamsT

from trpo_optim.algorithm.kl_checks import require_moving_kl, require_zero_kl
from trpo_optim.closure.checks import Numbers, checked_values
from trpo_optim.closure.evaluation import Closure, Objective
from trpo_optim.closure.parameters import ParameterVector
from trpo_optim.closure.transaction import Transaction
from trpo_optim.curvature.autograd_graph import now, require_attached
from trpo_optim.curvature.local_model import second_order
from trpo_optim.errors import TrustRegionError
from trpo_optim.optimizer import TrustRegionOptimizer
from trpo_optim.testing.findings import ClosureReport, Finding, Verdict, without
from trpo_optim.testing.minimum import REMEDY, flaw_at_minimum

__all__ = ["CLOSURE_CHECKS", "assert_closure", "check_closure"]

_NEAR = 3e-5
"""Nats within which the KL is looked at: far above rounding, far below a step."""


@dataclass
class _Subject:
    """A closure, evaluated within a transaction that puts everything back."""

    closure: Closure
    vector: ParameterVector
    transaction: Transaction
    log_prob: Callable[[], Tensor] | None
    advantages: Tensor | None
    maximize: bool
    objective: Objective = field(init=False)

    def __post_init__(self) -> None:
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


def _values(subject: _Subject) -> Finding:
    """It returns two attached scalars, calls no backward, and uses no stale graph."""
    name = "values"
    started = now()
    start = time.perf_counter()
    values = subject.objective.with_graph()
    seconds = time.perf_counter() - start
    require_attached((values.loss, values.kl), subject.vector.parameters, started)
    loss, kl, _ = values.numbers()
    figures = {"loss": loss, "kl": kl, "seconds": seconds}
    if math.isfinite(loss) and math.isfinite(kl):
        return Finding(name, Verdict.PASSED, figures)
    return Finding(
        name,
        Verdict.FAILED,
        figures,
        "Loss or KL is not a number where old and new policy are one.",
        "Look for zero probabilities, -inf times zero, and NaN in the batch.",
    )


def _deterministic(subject: _Subject) -> Finding:
    name = "deterministic"
    subject.objective.rewind()
    with torch.no_grad():
        first, second = (checked_values(subject.closure()).numbers()[:2] for _ in range(2))
    pairs = zip(first, second, strict=True)  # NaN twice is no difference, and NaN once is one
    gap = max(0.0 if math.isnan(a) and math.isnan(b) else abs(a - b) for a, b in pairs)
    if gap <= 1e-6 * max(1.0, abs(first[0])):
        return Finding(name, Verdict.PASSED, {"gap": gap})
    return Finding(
        name,
        Verdict.FAILED,
        {"gap": gap},
        f"Two calls at the same parameters differ by {gap:.3g}: the closure draws a new minibatch, "
        "or the policy has dropout, noise or moving statistics.",
        "Fix the batch before step(), and use policy.eval().",
    )


def _zero_kl(subject: _Subject) -> Finding:
    kl = subject.kl()
    require_zero_kl(kl, 1e-7, 1e-4)
    return Finding("zero kl", Verdict.PASSED, {"kl": kl})


def _moving_kl(subject: _Subject) -> Finding:
    """The KL answers to the parameters: the old policy is not made inside."""
    here, kls = subject.kl(), [math.nan]

    def elsewhere() -> Iterator[Numbers]:
        for step in subject.transaction.elsewhere():
            kls.append(subject.kl(step))
            yield Numbers(0.0, kls[-1])

    require_moving_kl(here, elsewhere(), 1e-7)
    return Finding("moving kl", Verdict.PASSED, {"kl far away": kls[-1]})


def _shape(subject: _Subject) -> Finding:
    """The KL is least at the parameters, and grows with the square of the step."""
    name = "kl"
    step, here = subject.direction(), subject.kl()
    for _ in range(60):
        if abs(subject.kl(step) - here) <= _NEAR:
            break
        step = step / 2
    if subject.kl(step) == here:
        return Finding(name, Verdict.UNDECIDED, {}, "The KL does not move.")
    figures, cause = flaw_at_minimum(lambda scale: subject.kl(scale * step) - here)
    if not cause:
        return Finding(name, Verdict.PASSED, figures)
    return Finding(name, Verdict.FAILED, figures, cause, REMEDY)


def _second_order(subject: _Subject) -> Finding:
    with torch.no_grad():
        model = second_order(subject.objective)
        model.product(model.gradient)
    return Finding(
        "second order", Verdict.PASSED, {}, model.fallback and f"{model.engine}: {model.fallback}."
    )


def _sign(subject: _Subject) -> Finding:
    """The loss falls when good actions become more likely."""
    name = "loss"
    if subject.log_prob is None or subject.advantages is None:
        return Finding(name, Verdict.UNDECIDED, {}, "Pass log_prob and advantages to check it.")
    with torch.enable_grad():
        logs = subject.log_prob()
        if logs.shape != subject.advantages.shape:
            raise TrustRegionError(
                f"log_prob has shape {tuple(logs.shape)} and advantages "
                f"{tuple(subject.advantages.shape)}: they broadcast. Make both (N,)."
            )
        sign = 1.0 if subject.maximize else -1.0
        values = (
            subject.objective.with_graph().loss,
            sign * (logs * subject.advantages).mean(),
            logs.mean(),  # the way of a loss whose every ratio meets every advantage
        )
        loss, right, broadcast = (
            subject.vector.gather(
                torch.autograd.grad(
                    value, subject.vector.parameters, allow_unused=True, retain_graph=True
                )
            )
            for value in values
        )
    cosine, other = (
        float(torch.nn.functional.cosine_similarity(loss, each, dim=0))
        for each in (right, broadcast)
    )
    least = max(0.5, abs(other) - 1e-6)
    if cosine > least:
        return Finding(name, Verdict.PASSED, {"cosine": cosine})
    turned = cosine < -least
    surrogate = "(ratio * advantages).mean()"
    return Finding(
        name,
        Verdict.FAILED,
        {"cosine": cosine},
        "The loss falls when bad actions become more likely: its sign is wrong."
        if turned
        else "The gradient of the loss has little to do with -mean(advantages * log_prob): shapes "
        "broadcast, or another term outweighs the surrogate.",
        (
            f"Return {surrogate}."
            if subject.maximize
            else f"Return -{surrogate}, or set maximize=True."
        )
        if turned
        else "Give ratio and advantages the shape (N,), and weigh entropy and penalties lightly.",
    )


CLOSURE_CHECKS: dict[str, Callable[[_Subject], Finding]] = {
    "values": _values,
    "deterministic": _deterministic,
    "zero kl": _zero_kl,
    "moving kl": _moving_kl,
    "kl": _shape,
    "loss": _sign,
    "second order": _second_order,
}
"""By name, in the order in which a fault is best read."""


def check_closure(
    closure: Closure,
    params: ParamsT,
    *,
    log_prob: Callable[[], Tensor] | None = None,
    advantages: Tensor | None = None,
    maximize: bool = False,
    skip: Collection[str] = (),
) -> ClosureReport:
    """Find out whether a handwritten closure is one that ``step`` can work with.

    It is called as before a step: old and new policy are the same. Nothing has moved afterwards.

    Args:
        closure: Takes no argument and returns ``(loss, kl)`` or ``(loss, kl, dist)``.
        params: The parameters that the optimizer is given, in any form that it takes.
        log_prob: Returns ln π of the batch's actions, (N,); with ``advantages``, for the loss.
        advantages: Of the same actions, (N,).
        maximize: Whether the optimizer has it: the closure's first value is to be raised.
        skip: Names of checks that are left out.

    Returns:
        One finding per check.

    Raises:
        TrustRegionError: If there is nothing to check, or ``skip`` names no check.
    """
    checks = without(CLOSURE_CHECKS, skip)
    groups = TrustRegionOptimizer(params).param_groups
    vector = ParameterVector(p for group in groups for p in group["params"] if p.requires_grad)
    findings = []
    with torch.no_grad():
        for name, check in checks.items():
            with Transaction(vector) as transaction:
                transaction.begin()
                try:
                    subject = _Subject(closure, vector, transaction, log_prob, advantages, maximize)
                    findings.append(check(subject))
                except Exception as error:  # whatever a closure may raise
                    told = str(error)
                    if not isinstance(error, TrustRegionError):
                        told = f"{type(error).__name__}: {told}"
                    findings.append(Finding(name, Verdict.FAILED, {}, told))
    return ClosureReport(tuple(findings))


def assert_closure(closure: Closure, params: ParamsT, **options: Any) -> None:
    """Raise where ``check_closure`` finds a fault.

    Args:
        closure: As for ``check_closure``.
        params: As for ``check_closure``.
        options: As for ``check_closure``.

    Raises:
        AssertionError: If a check fails, with all findings for its text.
    """
    check_closure(closure, params, **options).require()
