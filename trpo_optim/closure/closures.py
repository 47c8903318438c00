"""All closures of one step as one value, with their weights and the closure for curvature."""

from __future__ import annotations

import math
import types
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from trpo_optim.closure.checks import checked_values
from trpo_optim.closure.evaluation import Closure, ThirdValue
from trpo_optim.errors import TrustRegionError

__all__ = ["Closures", "collected", "shares"]


@dataclass(frozen=True)
class Closures:
    """All closures of one step as one value, which ``step`` takes in place of a closure.

    A call evaluates all parts and returns their weighted mean. With several parts there is no third
    value.

    Attributes:
        parts: One closure, or several closures that evaluate one micro-batch each.
        weights: The weight of each part, up to a common factor. None: equal weights.
        curvature: The closure whose KL gives the Fisher-vector products. None: the parts give them.

    Example:
        >>> import torch
        >>> from trpo_optim import Closures, TrustRegionOptimizer
        >>> mean = torch.zeros(2, requires_grad=True)  # of a Gaussian with variance 1
        >>> def on(rows):
        ...     return lambda: (-(rows @ mean).mean(), mean.square().sum() / 2)
        >>> micro_batches = [on(torch.ones(3, 2)), on(torch.ones(1, 2))]
        >>> closures = Closures(micro_batches, weights=[3, 1])
        >>> TrustRegionOptimizer([mean]).step(closures).accepted
        True
    """

    parts: Sequence[Closure]
    weights: Sequence[float] | None = None
    curvature: Closure | None = None

    def __post_init__(self) -> None:
        """Check that there is a list of closures."""
        if callable(self.parts):
            raise TrustRegionError(
                f"Closures() got a {type(self.parts).__name__} as its parts. Pass a list of "
                "closures, such as Closures([closure])."
            )

    @property
    def every(self) -> list[Closure]:
        """All closures. The one for curvature is the last."""
        return [*self.parts, *([] if self.curvature is None else [self.curvature])]

    def __call__(self) -> tuple[Tensor, Tensor] | tuple[Tensor, Tensor, ThirdValue | None]:
        """Return the loss and the KL of all parts together."""
        if len(self.parts) == 1:
            return self.parts[0]()
        values = [checked_values(part()) for part in self.parts]
        each = list(zip(shares(_plain(self.weights, len(self.parts))), values, strict=True))
        loss = torch.stack([share * part.loss for share, part in each]).sum()
        kl = torch.stack([share * part.kl for share, part in each]).sum()
        return loss, kl


def collected(
    closure: Closure | Closures | Iterable[Closure] | None,
    weights: Iterable[float] | float | None,
    curvature: Closure | None,
    *,
    shared: bool,
) -> Closures:
    """Return the arguments of ``step`` as one value.

    Args:
        closure: One closure, several closures that evaluate one micro-batch each, or ``Closures``.
        weights: The weights, up to a common factor: a number for one closure, a list for several.
            None: equal weights.
        curvature: The closure whose KL gives the Fisher-vector products. None: the others give
            them.
        shared: Whether other ranks take part in the step, so that this one may have no samples. A
            closure with weight 0 is then left out.

    Raises:
        TrustRegionError: If the arguments do not fit together.
    """
    if isinstance(closure, Closures):
        if curvature is not None or weights is not None:
            raise TrustRegionError(
                "step() got both a Closures object and weights= or curvature=. Closures already "
                "contains these; pass only one."
            )
        curvature, weights = closure.curvature, closure.weights
        parts: list[Any] = list(closure.parts)
    elif isinstance(closure, Iterable) and not (
        callable(closure) or isinstance(closure, str | Tensor)
    ):
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
            "step() got an empty list of closures. Pass at least one closure, one per micro-batch."
        )
    _require_bound(parts)
    if weights is None:
        return Closures(parts, None, curvature)
    plain = _plain(weights, len(parts), least="at least" if shared else "above")
    kept = [index for index, weight in enumerate(plain) if weight > 0]
    return Closures([parts[index] for index in kept], [plain[index] for index in kept], curvature)


def _require_bound(parts: Sequence[Any]) -> None:
    """Check that no function was made several times with the same variables, as a loop does.

    The very same object twice is no such mistake, and neither are equal arguments of a function
    that makes closures.

    Raises:
        TrustRegionError: If one was.
    """
    functions = {id(part): part for part in parts if isinstance(part, types.FunctionType)}
    seen: dict[tuple[int, ...], types.FunctionType] = {}
    for function in functions.values():
        other = seen.setdefault(_what_it_reads(function), function)
        if other is not function:
            first, second = (1 + [*map(id, parts)].index(id(each)) for each in (other, function))
            raise TrustRegionError(
                f"Closures {first} and {second} of {len(parts)} are one function with the same "
                "variables, so they evaluate the same samples. A function that is made in a loop "
                "reads the loop's variables when it is called, after the loop. Bind them when you "
                "make it: lambda rows=rows: ..., or functools.partial(closure, rows). To count a "
                "micro-batch twice, double its weight."
            )


def _what_it_reads(function: types.FunctionType) -> tuple[int, ...]:
    """Return the ``id`` of a function's code, and of every variable and default that it reads."""
    own = (function.__code__, function.__globals__, *(function.__closure__ or ()))
    keywords = (function.__kwdefaults__ or {}).values()
    return tuple(map(id, (*own, *(function.__defaults__ or ()), *keywords)))


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
            f"weights is {weights!r}; it must hold one number per closure, usually its number of "
            "samples."
        ) from error
    if len(plain) != count:
        raise TrustRegionError(
            f"step() got {count} closure{'' if count == 1 else 's'} and {len(plain)} weights. Pass "
            "one weight per closure, usually its number of samples."
        )
    for weight in plain:
        if not math.isfinite(weight) or weight < 0 or (weight == 0 and least == "above"):
            raise TrustRegionError(
                f"weights holds {weight!r}; each must be a finite number {least} 0, usually the "
                "number of samples of its closure."
            )
    return plain


def shares(weights: Sequence[float]) -> list[float]:
    """Return weights scaled to a sum of one.

    Args:
        weights: At least 0, not all of them 0.
    """
    largest = max(weights)
    total = math.fsum(weight / largest for weight in weights)
    return [weight / largest / total for weight in weights]
