"""Checks of what distributions are made of: bounds, logits, and whether all of it learns."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor
from torch.distributions import Distribution, constraints

from trpo_optim.distributions.parts import leaves, made_of, name_of
from trpo_optim.testing.clamps import NEAR, beyond, is_clamp
from trpo_optim.testing.findings import Finding, Verdict, failed
from trpo_optim.testing.subject import Subject

__all__ = ["check_arguments"]

_NORMALISER = "LogsumexpBackward0"

_SQUASHING = {"Softmax", "Sigmoid"}

_VIEWS = {
    *("Alias", "Clone", "Expand", "Permute", "Reshape", "ReshapeAlias", "Select", "Slice"),
    *("Split", "SplitWithSizes", "Squeeze", "T", "ToCopy", "Transpose", "Unbind", "Unsqueeze"),
    *("UnsafeView", "View"),
}
"""Operations of autograd that give the same numbers in another place."""

_ELEMENTWISE = {
    *("Abs", "Add", "Cat", "Diag", "DiagEmbed", "Div", "Exp", "Log", "Log1p", "MaskedFill", "Mul"),
    *("Neg", "Pow", "Reciprocal", "Sigmoid", "Softplus", "Sqrt", "Stack", "Sub", "Tanh", "Where"),
}
"""Operations that give each number from the one in its place."""

_FACTORS = (2.3, 5.0, 20.0)
"""Multiples of the way to a bound by the slope there. No square is zero at any of them."""

_CLAMPED = (
    "Start within the clamp's bounds, and clamp parameters under no_grad() after the step, or "
    "bound them by a smooth function (tanh, softplus)."
)

_AT_BOUND = "If it stays there, widen the clamp, or use a smooth function (tanh, softplus)."

_UNBOUNDED = (
    "Take exp() of a log_std, or softplus() of what the layer gives; pass logits=, not probs=."
)


def check_arguments(subject: Subject) -> Finding:
    """Arguments stay within their bounds, logits are no probabilities, and all of it learns."""
    name = "arguments"
    seen = 0
    for index, each in enumerate(_arguments(subject.dist())):
        seen += 1
        cause, remedy = _of_probabilities(each)
        if not cause:
            cause, remedy = _outside_clamp(subject, each)
        if not cause:
            cause, remedy = _beyond_bounds(subject, index, each)
        if cause:
            return failed(name, {"arguments": float(seen)}, cause, remedy)
    if subject.at_bound.any():
        names = subject.names()
        pairs = zip(subject.vector.parameters, subject.vector.split(subject.at_bound), strict=True)
        parts = [
            f"{names[id(each)]} lies at the bound of its clamp (within {NEAR:g}) in "
            f"{int(close.sum())} of {close.numel()} dimensions"
            for each, close in pairs
            if close.any()
        ]
        cause = f"{', '.join(parts)}: it learns to one side only. The other checks leave it out."
        return Finding(name, Verdict.UNDECIDED, {"arguments": float(seen)}, cause, _AT_BOUND)
    return Finding(name, Verdict.PASSED, {"arguments": float(seen)})


@dataclass(frozen=True)
class _Argument:
    """What a distribution was made of.

    Attributes:
        family: The distribution's, or that of what it is a part of.
        label: The argument's name.
        constraint: Its bounds.
        value: The tensor.
    """

    family: str
    label: str
    constraint: Any
    value: Tensor

    @property
    def entries(self) -> Tensor:
        """What the bounds are for: of a triangular factor, its diagonal."""
        factor = isinstance(self.constraint, type(constraints.lower_cholesky))
        return self.value.diagonal(dim1=-2, dim2=-1) if factor else self.value


def _arguments(policy: Any) -> Iterator[_Argument]:
    """Yield the tensors that distributions were made of and that depend on the parameters."""
    for leaf in leaves(policy):
        for dist in made_of(leaf):
            try:
                bounds = dist.arg_constraints
            except NotImplementedError:
                continue
            for label, constraint in bounds.items():
                value = vars(dist).get(label)
                if isinstance(value, Tensor) and value.requires_grad:
                    yield _Argument(name_of(leaf), label, constraint, value)


def _of_probabilities(argument: _Argument) -> tuple[str, str]:
    """Return what is wrong where probabilities were passed as logits."""
    if argument.label != "logits":
        return "", ""
    raw, node = argument.value.detach(), argument.value.grad_fn
    below = [] if node is None else [each for each, _ in node.next_functions]
    normalised = len(below) == 2 and below[1] is not None and below[1].name() == _NORMALISER
    if normalised:
        node, normaliser = below[0], cast("Any", below[1])
        raw = normaliser._saved_self.detach()
    sums = normalised and raw.shape[-1] > 1 and bool(((raw.sum(-1) - 1).abs() < 1e-4).all())
    allowed = raw[raw > -torch.inf]
    inside = bool(((allowed >= 0) & (allowed <= 1)).all())
    if not (inside and (sums or _origin(node) in _SQUASHING)):
        return "", ""
    return (
        (
            f"{argument.family} was given probabilities as logits: they lie in [0, 1]"
            f"{' and sum to one' if sums else ''}, so that no action can become likely or rare."
        ),
        "Pass what comes before softmax or sigmoid as logits=, or the probabilities as probs=.",
    )


def _origin(node: Any) -> str:
    """Return the name of the operation that a tensor comes from, whatever view of it this is."""
    while node is not None and node.name().removesuffix("Backward0") in _VIEWS | {"MaskedFill"}:
        node = node.next_functions[0][0]
    return "" if node is None else str(node.name()).removesuffix("Backward0")


def _outside_clamp(subject: Subject, argument: _Argument) -> tuple[str, str]:
    """Return what is wrong where a clamp leaves a dimension of an argument without gradient."""
    stack, seen = [cast("Any", argument.value.grad_fn)], set[Any]()
    while stack:
        node = stack.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        kind = node.name().rstrip("01").removesuffix("Backward")
        if is_clamp(node):
            outside = beyond(node)
            by_row = outside.dim() > 1 and len(outside) == subject.rows
            lost = outside.flatten(1).all(0) if by_row else outside
            if lost.any():
                below = next(each for each, _ in node.next_functions if each is not None)
                names = subject.names()
                what = names.get(
                    id(getattr(below, "variable", None)), f"what gives {argument.label}"
                )
                place = f"the clamp on the way to {argument.label} of {argument.family}"
                told = (
                    f"{what} lies outside {place} in {int(lost.sum())} of {lost.numel()} "
                    "dimensions, where its gradient is zero: it would never move."
                )
                return told, _CLAMPED
        elif kind not in _ELEMENTWISE | _VIEWS:
            continue  # a layer: units before it may be saturated
        stack.extend(each for each, _ in node.next_functions)
    return "", ""


def _beyond_bounds(subject: Subject, index: int, argument: _Argument) -> tuple[str, str]:
    """Return what is wrong where a move of the parameters takes an argument out of its bounds."""
    for low, high in _bounds(argument.constraint):
        for bound, sign in ((low, 1.0), (high, -1.0)):
            if bound is None:
                continue
            reached = _most_beyond(subject, index, bound, sign)
            if reached is not None:
                side = f"{'above' if sign > 0 else 'below'} {float(bound):g}"
                told = (
                    f"Nothing keeps {argument.label} of {argument.family} {side}: a move of the "
                    f"parameters makes it {reached:.3g}. It is a raw parameter or output."
                )
                return told, _UNBOUNDED
    return "", ""


def _most_beyond(subject: Subject, index: int, bound: Any, sign: float) -> float | None:
    """Return what an argument becomes where its own slope would take it beyond a bound.

    Args:
        subject: The policy.
        index: Which of its arguments.
        bound: The bound.
        sign: 1 if that is a lower one, else −1.

    Returns:
        A number clearly beyond it, or None if there is none.
    """
    gap = _gap(subject, index, bound, sign)
    slope = subject.gradient(gap)
    far, square = float(gap.detach()), float(slope.square().sum())
    if not square > 0:
        return None
    for factor in _FACTORS:
        with subject.at(-factor * far / square * slope), _unvalidated():
            reached = _reached(subject, index, bound, sign)
        if reached < -0.1 * far:
            return float(bound) + sign * reached
    return None


def _gap(subject: Subject, index: int, bound: Any, sign: float) -> Tensor:
    """Return how far the nearest entry of an argument is from a bound, with a graph of its own."""
    argument = list(_arguments(subject.dist()))[index]
    gap: Tensor = (sign * (argument.entries - bound)).min()
    return gap


def _reached(subject: Subject, index: int, bound: Any, sign: float) -> float:
    """Return the same as a number, NaN where the policy cannot be evaluated."""
    try:
        return float(_gap(subject, index, bound, sign).detach())
    except (ValueError, IndexError, RuntimeError):
        return math.nan


def _bounds(constraint: Any) -> Iterator[tuple[Any, Any]]:
    """Yield the lower and the upper bound of an argument's entries, None where there is none."""
    while isinstance(constraint, constraints.independent):
        constraint = constraint.base_constraint
    if isinstance(constraint, type(constraints.lower_cholesky)):
        yield 0.0, None
        return
    if not getattr(constraint, "is_discrete", False):
        yield getattr(constraint, "lower_bound", None), getattr(constraint, "upper_bound", None)


@contextmanager
def _unvalidated() -> Iterator[None]:
    """Have torch make distributions whatever their arguments are."""
    usual = Distribution._validate_args
    Distribution.set_default_validate_args(False)
    try:
        yield
    finally:
        Distribution.set_default_validate_args(usual)
