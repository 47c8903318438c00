"""What a closure must return: the form of its values."""

from __future__ import annotations

from collections.abc import Mapping
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
    "checked_values",
]


DETACHED = (
    "The closure's loss or kl is detached: it does not depend on the optimizer's parameters. "
    "Compute both from the policy inside the closure, without detach(), .data or no_grad(), "
    "and hand this policy's parameters to the optimizer."
)

BACKWARD_CALLED = (
    "The closure called backward(). Return (loss, kl), without zero_grad() and backward(): the "
    "optimizer computes the derivatives."
)


@dataclass(frozen=True)
class Values:
    """The values of one evaluation.

    Attributes:
        loss: A scalar.
        kl: The mean KL, a scalar.
        largest_kl: The largest KL of a sample, without a graph. None if it is not known.
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
    """Return the checked values of a closure's result.

    Args:
        returned: Whatever the closure returned.

    Returns:
        The loss and the KL. A KL per sample is averaged.

    Raises:
        TrustRegionError: If it is not ``(loss, kl)`` or ``(loss, kl, dist)``.
    """
    if not isinstance(returned, tuple | list) or len(returned) not in (2, 3):
        count = f"{len(returned)} values" if isinstance(returned, tuple | list) else "one value"
        raise TrustRegionError(
            f"The closure returned {count} ({_kind(returned)}). Return two scalar tensors, (loss, "
            "kl): the surrogate loss and the mean KL(old || new). A third value is optional: "
            "(loss, kl, dist), where dist may be a tuple of tensors."
        )
    for name, value in zip(("loss", "kl"), returned, strict=False):
        if not isinstance(value, Tensor):
            raise TrustRegionError(
                f"The closure's {name} is {_kind(value)}, not a tensor. Return it without "
                ".item(), float() or numpy()."
            )
        if value.dim() > (name == "kl") or value.numel() == 0:
            wanted = (
                "a scalar or a vector with one KL per sample. Compute it by mean_kl(old, new), or "
                "sum over the dimensions of an action first."
                if name == "kl"
                else "a scalar. Reduce it over the batch, usually with .mean()."
            )
            raise TrustRegionError(
                f"The closure's {name} has shape {tuple(value.shape)}; it must be {wanted}"
            )
        if value.is_meta:
            raise TrustRegionError(
                f"The closure's {name} lies on the device meta, which holds no numbers. Compute it "
                "on the device of the parameters."
            )
        if not value.is_floating_point():
            raise TrustRegionError(
                f"The closure's {name} is {value.dtype}; it must be real floating point. Compute "
                "it from the policy's real outputs."
            )
    if len(returned) == 3 and not (returned[2] is None or _is_distribution(returned[2])):
        raise TrustRegionError(
            f"The closure's third value is {_kind(returned[2])}. Return the new policy's "
            "torch.distributions.Distribution, a tensor, or a tuple or dict of these, or leave it "
            "out."
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
