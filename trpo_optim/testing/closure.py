"""check_closure: whether a trust region can be built on what a handwritten closure returns."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from functools import partial
from itertools import takewhile
from typing import Any

import torch
from torch import Tensor
from torch.optim.optimizer import ParamsT

from trpo_optim.algorithm.kl_checks import require_moving_kl, require_zero_kl
from trpo_optim.closure.checks import Numbers, checked_values
from trpo_optim.closure.closures import Closures, collected
from trpo_optim.closure.evaluation import Closure
from trpo_optim.closure.parameters import ParameterVector, trainable
from trpo_optim.closure.transaction import Transaction
from trpo_optim.curvature.autograd_graph import calls_python, graph_leaves, now, require_attached
from trpo_optim.curvature.averages import weighted_mean
from trpo_optim.distributions.masks import checked_mask
from trpo_optim.errors import TrustRegionError, blaming
from trpo_optim.optimizer import TrustRegionOptimizer
from trpo_optim.testing.clamps import NEAR
from trpo_optim.testing.closure_subject import ClosureSubject
from trpo_optim.testing.findings import (
    ClosureReport,
    Finding,
    Verdict,
    each_of,
    failed,
    named,
    undecided,
    without,
)
from trpo_optim.testing.kl_scale import check_kl_scale
from trpo_optim.testing.loss_check import check_loss
from trpo_optim.testing.minimum import at_minimum
from trpo_optim.testing.second_order_check import check_second_order
from trpo_optim.testing.slope_check import check_slope

__all__ = ["CLOSURE_CHECKS", "assert_closure", "check_closure"]

_NEAR, _FARTHEST = 3e-5, 3e-2
"""Nats within which the KL is looked at: far above rounding, far below a step; and where rounding
hides it there, up to which."""


def _values(subject: ClosureSubject) -> Finding:
    """It returns two attached scalars, calls no backward, and uses no stale graph."""
    name = "values"
    seconds, numbers = 0.0, list[tuple[float, float]]()
    reached, hidden = dict[int, Tensor](), False
    for each in subject.every:
        started = now()
        start = time.perf_counter()
        with blaming(each.name):
            values = each.with_graph()
            require_attached((values.loss, values.kl), subject.vector.parameters, started)
        seconds += time.perf_counter() - start
        numbers.append(values.numbers()[:2])
        for value in (values.loss, values.kl):
            reached |= {id(leaf): leaf for leaf in graph_leaves(value)}
            hidden |= calls_python(value)
        del values  # and so the graph
    losses, kls = zip(*numbers[: len(subject.batch.parts)], strict=True)
    means = [weighted_mean(subject.batch.weights, each) for each in (losses, kls)]
    figures = {"loss": means[0], "kl": means[1], "seconds": seconds}
    for each, pair in zip(subject.every, numbers, strict=True):
        if not all(map(math.isfinite, pair)):
            cause = "Loss or KL is not a number where old and new policy are one."
            remedy = "Look for zero probabilities, -inf times zero, and NaN in the batch."
            return failed(name, figures, named(each.name, cause), remedy)
    notes = _stays(subject.vector, reached, hidden=hidden), _at_bounds(subject)
    return Finding(name, Verdict.PASSED, figures, " ".join(filter(None, notes)))


def _at_bounds(subject: ClosureSubject) -> str:
    """Return which parameters lie at the bound of a clamp, for a note."""
    pairs = zip(subject.vector.names, subject.vector.split(subject.at_bound), strict=True)
    names = [label for label, close in pairs if close.any()]
    if not names:
        return ""
    return (
        f"At the bound of their clamp (within {NEAR:g}) lie {', '.join(names[:4])}"
        f"{subject.vector.counting}: they learn to one side only. Other checks leave them out."
    )


def _stays(vector: ParameterVector, reached: Mapping[int, Tensor], *, hidden: bool) -> str:
    """Return what no step moves, for a note.

    Args:
        vector: The parameters.
        reached: The tensors that loss and KL are made from, by ``id``.
        hidden: Whether a Python function may hide others.
    """
    own = set(map(id, vector.leaves))
    strangers = [f"{tuple(leaf.shape)}" for key, leaf in reached.items() if key not in own]
    note = ""
    if strangers:
        note = (
            "Loss or KL depends on tensors that require gradients and are not among the "
            f"parameters, so no step moves them. Their shapes: {', '.join(strangers[:4])}. "
        )
    pairs = zip(vector.names, vector.leaves, strict=True)
    unused = [label for label, leaf in pairs if id(leaf) not in reached]
    if unused and not hidden:
        note += (
            "Neither loss nor KL depends on these parameters, so no step moves them: "
            f"{', '.join(unused[:4])}{vector.counting}."
        )
    return note.strip()


def _deterministic(subject: ClosureSubject) -> Finding:
    name = "deterministic"
    widest = 0.0
    for each in subject.every:
        each.rewind()
        with torch.no_grad(), blaming(each.name):
            first, second = (checked_values(each.closure()).numbers()[:2] for _ in range(2))
        pairs = zip(first, second, strict=True)  # NaN twice is no difference, and NaN once is one
        gap = max(0.0 if math.isnan(a) and math.isnan(b) else abs(a - b) for a, b in pairs)
        if not gap <= 1e-6 * max(1.0, abs(first[0])):
            cause = (
                f"Two calls at the same parameters differ by {gap:.3g}: the closure draws a new "
                "minibatch, or the policy has dropout, noise or moving statistics."
            )
            remedy = "Fix the batch before step(), and use policy.eval()."
            return failed(name, {"gap": gap}, named(each.name, cause), remedy)
        widest = max(widest, gap)
    return Finding(name, Verdict.PASSED, {"gap": widest})


def _zero_kl(subject: ClosureSubject) -> Finding:
    for each in subject.every:
        with blaming(each.name):
            require_zero_kl(each.values().kl, 1e-7, 1e-4)
    return Finding("zero kl", Verdict.PASSED, {"kl": subject.kl()})


def _moving_kl(subject: ClosureSubject) -> Finding:
    """The KL answers to the parameters: the old policy is not made inside."""
    here, kls = subject.kl(), [math.nan]

    def elsewhere() -> Iterator[Numbers]:
        for step in subject.transaction.elsewhere():
            kls.append(subject.kl(step))
            yield Numbers(0.0, kls[-1])

    require_moving_kl(here, elsewhere(), 1e-7)
    return Finding("moving kl", Verdict.PASSED, {"kl far away": kls[-1]})


def _shape(subject: ClosureSubject) -> Finding:
    """The KL is least at the parameters, and grows with the square of the step."""
    name = "kl"
    step, here = subject.direction(), subject.kl()
    nats = max(_NEAR, subject.vector.precision / 2)
    for _ in range(60):
        if abs(subject.kl(step) - here) <= nats:
            break
        step = step / 2
    if subject.kl(step) == here:
        return undecided(name, "The KL does not move.")
    longer = takewhile(lambda each: nats * each**2 <= _FARTHEST, (3.0, 10.0, 30.0))
    return at_minimum(name, lambda scale: subject.kl(scale * step) - here, {}, longer)


CLOSURE_CHECKS: dict[str, Callable[[ClosureSubject], Finding]] = {
    "values": _values,
    "deterministic": _deterministic,
    "zero kl": _zero_kl,
    "moving kl": _moving_kl,
    "kl": _shape,
    "kl scale": check_kl_scale,
    "loss": check_loss,
    "loss slope": check_slope,
    "second order": check_second_order,
}
"""The checks of ``check_closure`` by name, in the order of causes.

Example:
    >>> from trpo_optim.testing import CLOSURE_CHECKS
    >>> list(CLOSURE_CHECKS)[:3]
    ['values', 'deterministic', 'zero kl']
"""


def check_closure(
    closure: Closure | Closures | Iterable[Closure],
    params: ParamsT,
    *,
    log_prob: Callable[[], Tensor] | None = None,
    advantages: Tensor | None = None,
    mask: Tensor | None = None,
    maximize: bool = False,
    skip: Collection[str] = (),
) -> ClosureReport:
    """Find out whether ``step`` can work with a handwritten closure.

    Call it where you would call ``step``: old and new policy are equal there. It leaves everything
    as it was. Each closure of a list is checked, one at a time, and the finding names the closure
    at fault.

    Args:
        closure: Takes no argument and returns ``(loss, kl)`` or ``(loss, kl, dist)``. It may also
            be a list of these, or ``Closures``, as for ``step``.
        params: The optimizer's parameters, in any form that it takes.
        log_prob: A function that returns ln π of the batch's actions, (N,), or in the shape of the
            mask. With ``advantages`` it serves to check the loss. With several closures, it is of
            the actions of all, in the order of the closures.
        advantages: The advantages of these actions. With a mask of shape (N, T), they may have
            shape (N,).
        mask: True where an element counts: no padding, and no prompt of a language model. None: all
            count.
        maximize: Whether the optimizer has ``maximize=True``.
        skip: Names of checks to leave out.

    Returns:
        One finding per check.

    Raises:
        TrustRegionError: If there is nothing to check, or ``skip`` names no check.

    Example:
        >>> import torch
        >>> from torch.distributions import Categorical
        >>> from trpo_optim.testing import check_closure
        >>> logits, actions = torch.zeros(4, 2, requires_grad=True), torch.tensor([0, 1, 0, 1])
        >>> def closure():  # its KL is a constant
        ...     loss = -Categorical(logits=logits).log_prob(actions).mean()
        ...     return loss, 0 * logits.sum()
        >>> report = check_closure(closure, [logits])
        >>> report.failures[0].check
        'moving kl'
    """
    checks = without(CLOSURE_CHECKS, skip)
    mask = checked_mask(mask)
    groups = TrustRegionOptimizer(params).param_groups
    vector = ParameterVector(trainable(groups))
    try:
        closures = collected(closure, None, None, shared=False)
    except TrustRegionError as error:
        return ClosureReport((failed("values", {}, str(error)),))

    def run(check: Callable[[ClosureSubject], Finding]) -> Finding:
        with torch.no_grad(), Transaction(vector) as transaction:
            transaction.hold(closures.every)
            transaction.begin()
            subject = ClosureSubject(
                closures, vector, transaction, log_prob, advantages, mask, maximize
            )
            return check(subject)

    return ClosureReport(
        tuple(each_of({name: partial(run, check) for name, check in checks.items()}, _told))
    )


def _told(error: Exception) -> str:
    own = isinstance(error, TrustRegionError)
    return str(error) if own else f"{type(error).__name__}: {error}"


def assert_closure(
    closure: Closure | Closures | Iterable[Closure], params: ParamsT, **options: Any
) -> None:
    """Raise an error if ``check_closure`` finds a fault.

    Args:
        closure: As for ``check_closure``.
        params: As for ``check_closure``.
        options: As for ``check_closure``.

    Raises:
        AssertionError: If a check fails. The text has all findings.

    Example:
        >>> import torch
        >>> from torch.distributions import Categorical
        >>> from trpo_optim import frozen, mean_kl
        >>> from trpo_optim.testing import assert_closure
        >>> logits, actions = torch.zeros(4, 2, requires_grad=True), torch.tensor([0, 1, 1, 1])
        >>> old = frozen(Categorical(logits=logits))
        >>> def closure():
        ...     new = Categorical(logits=logits)
        ...     ratio = (new.log_prob(actions) - old.log_prob(actions)).exp()
        ...     return -(ratio * torch.arange(4)).mean(), mean_kl(old, new), new
        >>> assert_closure(closure, [logits])
    """
    check_closure(closure, params, **options).require()
