"""What a closure must return: the form of its values, and a KL that is one."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.distributions import Distribution

from trpo_optim.errors import TrustRegionError

__all__ = [
    "BACKWARD_CALLED",
    "DETACHED",
    "Numbers",
    "Values",
    "blaming",
    "checked_values",
    "require_largest_kl",
    "require_moving_kl",
    "require_zero_kl",
]


DETACHED = (
    "The closure's loss or kl is detached: it does not depend on the optimizer's parameters. "
    "Compute both from the policy inside the closure, without detach(), .data or no_grad(), "
    "and hand this policy's parameters to the optimizer."
)

BACKWARD_CALLED = (
    "The closure called backward(). Return (loss, kl) and leave the derivatives to the "
    "optimizer; no zero_grad() and no backward()."
)


@dataclass(frozen=True)
class Values:
    """What one evaluation returned.

    Attributes:
        loss: A scalar.
        kl: The mean KL, a scalar.
        largest_kl: The largest KL of a sample, without a graph; None where it is not known.
        third: The third value, or None.
    """

    loss: Tensor
    kl: Tensor
    largest_kl: Tensor | None
    third: Any = None

    def numbers(self) -> Numbers:
        """Return the values as floats, in one transfer to the host where that is possible."""
        kls = [self.kl.detach()] + ([] if self.largest_kl is None else [self.largest_kl])
        if self.loss.device == self.kl.device:
            return Numbers(*torch.stack([self.loss.detach(), *kls]).tolist())
        return Numbers(self.loss.item(), *(each.item() for each in kls))


class Numbers(NamedTuple):
    """The values of an evaluation, as floats."""

    loss: float
    kl: float
    largest_kl: float | None = None


def checked_values(returned: Any) -> Values:
    """Return the two values of a closure's result.

    Args:
        returned: Whatever the closure returned.

    Returns:
        The loss and the KL, of which one per sample is averaged.

    Raises:
        TrustRegionError: If it is not ``(loss, kl)`` or ``(loss, kl, dist)``.
    """
    if not isinstance(returned, tuple | list) or len(returned) not in (2, 3):
        count = f"{len(returned)} values" if isinstance(returned, tuple | list) else "one value"
        raise TrustRegionError(
            f"The closure returned {count} ({_kind(returned)}). Return two scalar tensors, "
            "(loss, kl): the surrogate loss and the mean KL(old || new); or a third value with "
            "them, (loss, kl, dist), which may be a tuple of tensors."
        )
    for name, value in zip(("loss", "kl"), returned, strict=False):
        if not isinstance(value, Tensor):
            raise TrustRegionError(
                f"The closure's {name} is {_kind(value)}, not a tensor. Return it without "
                ".item(), float() or numpy()."
            )
        if value.dim() > (name == "kl") or value.numel() == 0:
            per_sample = ", or return one KL per sample, a vector" if name == "kl" else ""
            raise TrustRegionError(
                f"The closure's {name} has shape {tuple(value.shape)}, not that of a scalar. "
                f"Reduce it over the batch, usually with .mean(){per_sample}."
            )
        if not value.is_floating_point():
            raise TrustRegionError(
                f"The closure's {name} is {value.dtype}; it must be real floating point."
            )
    if len(returned) == 3 and not (returned[2] is None or _is_distribution(returned[2])):
        raise TrustRegionError(
            f"The closure's third value is {_kind(returned[2])}. Return the new policy's "
            "torch.distributions.Distribution (or a tensor, or a tuple or dict of these), or leave "
            "it out."
        )
    loss, kl, *third = returned
    largest = kl.detach().max() if kl.dim() else None
    return Values(loss, kl.mean() if kl.dim() else kl, largest, *third)


def _is_distribution(value: Any) -> bool:
    if isinstance(value, Mapping):
        return _is_distribution(tuple(value.values()))
    if isinstance(value, tuple | list):
        return bool(value) and all(map(_is_distribution, value))
    return isinstance(value, Distribution | Tensor)


def _kind(value: Any) -> str:
    return f"a {type(value).__name__}"


@contextmanager
def blaming(name: str) -> Iterator[None]:
    """Have a misuse say which of several closures it was found in.

    Args:
        name: Which of a step's closures it is, or empty where there is one.

    Yields:
        Nothing.

    Raises:
        TrustRegionError: The misuse, named.
    """
    try:
        yield
    except TrustRegionError as error:
        if not name:
            raise
        raise TrustRegionError(f"In {name}: {error}") from error


def require_largest_kl(largest_kl: float | None) -> None:
    """Check that the closure said what each sample's KL is, where the largest is to be held.

    Args:
        largest_kl: The largest of them, or None where the KL was a scalar.

    Raises:
        TrustRegionError: If it was.
    """
    if largest_kl is None:
        raise TrustRegionError(
            "constraint is 'max', and the closure's KL is a scalar, of which no largest is known. "
            "Return the KL of every sample, a vector of shape (N,): joint_kl(old, new). Or set "
            "constraint='mean'."
        )


def require_zero_kl(kl: float, resolution: float, max_kl: float | None) -> None:
    """Check that the KL is about zero where the old policy and the new one are the same.

    Args:
        kl: The closure's KL at the current parameters, in nats; one that is not finite passes.
        resolution: KLs closer than this cannot be told apart, in nats.
        max_kl: The radius, in nats; a tenth of it counts as about zero.

    Raises:
        TrustRegionError: If the KL is anything else.
    """
    limit = max(10 * resolution, (0.01 if max_kl is None else max_kl) / 10)
    if math.isfinite(kl) and abs(kl) > limit:
        raise TrustRegionError(
            f"The closure's KL is {kl:g} at the current parameters, "
            f"not about zero (at most {limit:g}). Compute the old distribution afresh before every "
            "step, with the same parameters, batch and dropout mask, and return KL(old || new), "
            "not an entropy or a penalty."
        )


def require_moving_kl(kl_before: float, elsewhere: Iterable[Numbers], resolution: float) -> None:
    """Check that the KL answers to the parameters.

    A KL that stays zero compares the new policy with itself: the trust region would never bind.

    Args:
        kl_before: The closure's KL at the current parameters, in nats.
        elsewhere: The closure's values at other parameters, made as far as they are looked at.
        resolution: KLs closer than this cannot be told apart, in nats.

    Raises:
        TrustRegionError: If the KL changes nowhere, and both are numbers somewhere.
    """
    same = []
    for loss, kl, _ in elsewhere:
        if not math.isfinite(loss) or math.isnan(kl):
            continue
        if abs(kl - kl_before) > resolution:
            return
        same.append(kl)
    if same:
        raise TrustRegionError(
            f"The closure's KL stays at {same[0]:g} however far the parameters move: the trust "
            "region would never bind. Compute the old distribution and the old log-probabilities "
            "once, outside the closure and detached, and return KL(old || new) of the policy that "
            "the loss uses."
        )
