"""What the closure's KL must be for a trust region to exist: zero here, and not everywhere."""

from __future__ import annotations

import math
from collections.abc import Iterable

from trpo_optim.algorithm.interfaces import Numbers
from trpo_optim.errors import TrustRegionError

__all__ = ["require_largest_kl", "require_moving_kl", "require_resolved", "require_zero_kl"]


def require_largest_kl(largest_kl: float | None) -> None:
    """Check that the closure said what each sample's KL is, where the largest is to be held.

    Args:
        largest_kl: The largest of them, or None where the KL was a scalar.

    Raises:
        TrustRegionError: If it was.
    """
    if largest_kl is None:
        raise TrustRegionError(
            "constraint is 'max', and the closure's KL is a scalar, so the largest KL of a sample "
            "is not known. Return the KL of every sample, a vector of shape (N,): joint_kl(old, "
            "new). With token_closures, pass old='logits': an estimate by log-probabilities has no "
            "KL per token. Or set constraint='mean'."
        )


def require_resolved(max_kl: float | None, resolution: float) -> None:
    """Check that a radius is not lost in the rounding of the KL.

    Args:
        max_kl: The radius, in nats, or None. A radius of 0, where a schedule ends, takes no step.
        resolution: KLs closer than this cannot be told apart, in nats.

    Raises:
        TrustRegionError: If it is.
    """
    if max_kl is not None and 0 < max_kl < resolution:
        raise TrustRegionError(
            f"max_kl is {max_kl:g}, but the precision of the closure's KL resolves "
            f"{resolution:.2g} nats. Raise max_kl, or use a higher precision: mean_kl() computes "
            "in float32 at least, and policy.double() in float64."
        )


def require_zero_kl(kl: float, resolution: float, max_kl: float | None) -> None:
    """Check that the KL is about zero where the old policy and the new one are the same.

    Args:
        kl: The closure's KL at the current parameters, in nats; one that is not finite passes.
        resolution: KLs closer than this cannot be told apart, in nats.
        max_kl: The radius, in nats; a tenth of it counts as about zero. None or 0: there is none.

    Raises:
        TrustRegionError: If the KL is anything else.
    """
    radius = max_kl or 0.01
    limit = max(min(10 * resolution, radius), radius / 10)
    if math.isfinite(kl) and abs(kl) > limit:
        raise TrustRegionError(
            f"The closure's KL is {kl:g} at the current parameters, "
            f"not about zero (at most {limit:g}). Compute the old distribution anew before every "
            "step, with the same parameters, batch and dropout mask. Return KL(old || new), "
            "not an entropy or a penalty. If another policy drew the actions, such as an inference "
            "server or an earlier iterate, use that policy in the ratio, and the present policy as "
            "the old one in the KL."
        )


def require_moving_kl(
    kl_before: float,
    elsewhere: Iterable[Numbers | None],
    resolution: float,
    moves: str = "the parameters move",
) -> None:
    """Check that the KL answers to the parameters.

    A KL that stays zero compares the new policy with itself: the trust region would never bind.

    Args:
        kl_before: The closure's KL at the current parameters, in nats.
        elsewhere: The closure's values at other parameters, evaluated only as far as needed. None,
            where the closure cannot be evaluated, ends the search.
        resolution: KLs closer than this cannot be told apart, in nats.
        moves: What moves, for the error.

    Raises:
        TrustRegionError: If the KL changes nowhere, and both are numbers somewhere.
    """
    same = []
    for values in elsewhere:
        if values is None:
            break
        if not math.isfinite(values.loss) or math.isnan(values.kl):
            continue
        if abs(values.kl - kl_before) > resolution:
            return
        same.append(values.kl)
    if same:
        raise TrustRegionError(
            f"The closure's KL stays at {same[0]:g} however far {moves}, so the trust region "
            "has no effect. Compute the old distribution and the old log-probabilities "
            "once, outside the closure and detached, and return KL(old || new) of the policy that "
            "the loss uses."
        )
