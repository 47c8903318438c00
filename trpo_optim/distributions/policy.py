"""What a trust region needs of a policy's distribution, whatever its family."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.distributions import Distribution

from trpo_optim.distributions.kl import kl_of_family
from trpo_optim.distributions.masks import checked_mask, masked_mean, require_fit
from trpo_optim.distributions.parts import (
    constant_transforms,
    leaves,
    made_of,
    name_of,
    paired,
    require_valid,
    tensors,
)
from trpo_optim.distributions.precision import at_least_single, widened
from trpo_optim.errors import TrustRegionError

__all__ = ["entropy", "frozen", "joint_kl", "log_prob", "mean_kl", "sample", "sampled_kl"]

PolicyT = TypeVar("PolicyT", bound="Distribution | Mapping[str, Any] | Sequence[Any]")
"""A distribution, or a dict or tuple of independent ones: one for each part of the action."""


def mean_kl(old: PolicyT, new: PolicyT, mask: Tensor | None = None) -> Tensor:
    """Return the batch mean of the joint KL(old ‖ new), in nats.

    Joint means summed over all that is one action: event dimensions, and the parts of a tuple or
    dict. Actions that are masked out by logits of −inf in both count for nothing, and so does what
    they do to gradients. Of a tanh-squashed or otherwise transformed distribution it is the KL of
    the base.

    Args:
        old: The distribution that acted, usually ``frozen``.
        new: One of the same families and shapes.
        mask: True where an element counts (no padding), of the shape of the batch; dimensions
            beyond it belong to the action. None: all count.

    Returns:
        A scalar, in single precision at least; in double where the family's formula cancels.

    Raises:
        TrustRegionError: If families, shapes or parts differ, no closed form is known, the policy
            moves its support (Uniform, Pareto), it is not plain which dimensions are the action's,
            the old one carries a graph, or the mask does not fit.
    """
    counted = None if mask is None else checked_mask(mask)
    kl = masked_mean(_kl_of_batch(old, new, counted), counted)
    if not kl.isfinite():  # the new policy's numbers are for the step to judge
        for part in leaves(old):
            require_valid(part)
    return kl


def joint_kl(old: PolicyT, new: PolicyT, mask: Tensor | None = None) -> Tensor:
    """Return the joint KL(old ‖ new) of every sample, in nats: ``mean_kl`` before its mean.

    What a closure returns so that ``constraint="max"`` can hold the largest of them.

    Args:
        old: The distribution that acted, usually ``frozen``.
        new: One of the same families and shapes.
        mask: True where an element counts, of the shape of the batch. None: all count.

    Returns:
        The batch's shape; with a mask, a vector of those that count.

    Raises:
        TrustRegionError: As ``mean_kl``.
    """
    counted = None if mask is None else checked_mask(mask)
    kl = _kl_of_batch(old, new, counted)
    if counted is None:
        return kl
    require_fit(counted, kl)
    return kl[counted]


def sampled_kl(
    old_log_prob: Tensor,
    new_log_prob: Tensor,
    mask: Tensor | None = None,
    *,
    low_variance: bool = False,
) -> Tensor:
    """Estimate the batch mean of KL(old ‖ new) on actions that the old policy drew, in nats.

    For policies whose KL has no closed form: mixtures, normalising flows. With r = π_new/π_old, the
    plain estimator is the mean of −ln r; the other one the mean of r − 1 − ln r. Both are without
    bias, since r has the mean 1 under the old policy. A small step's KL is about var(ln r)/2, which
    the plain one estimates with standard deviation √(2 KL/N): it may come out negative, which
    counts as within the radius. The other one is never negative and its variance of higher order in
    the step, but it is heavy-tailed once r is far from 1.

    The derivatives of either are those of r − 1 − ln r. Its Hessian where both policies are one is
    the Fisher matrix by the score, the mean of ∇ln π ∇ln πᵀ over the batch: positive
    semi-definite whatever the sample, which the plain estimator's own Hessian is not.

    Args:
        old_log_prob: ln π_old of the batch's actions, without a graph.
        new_log_prob: ln π_new of the same; best returned as the closure's third value, too.
        mask: True where an element counts, of the same shape. None: all count.
        low_variance: Whether to take r − 1 − ln r.

    Returns:
        A scalar.

    Raises:
        TrustRegionError: If the shapes differ, the old ones carry a graph, or the mask does not
            fit.

    Source:
        Schulman, "Approximating KL divergence" (2020), joschu.net/blog/kl-approx.html.
    """
    if old_log_prob.shape != new_log_prob.shape:
        raise TrustRegionError(
            f"The old log-probabilities have shape {tuple(old_log_prob.shape)} and the new ones "
            f"{tuple(new_log_prob.shape)}. Take both of the same actions, one number for each."
        )
    if old_log_prob.requires_grad:
        raise TrustRegionError(
            "The old log-probabilities carry a graph. Compute them under no_grad before the step, "
            "and pass them first, the new ones second."
        )
    counted = None if mask is None else checked_mask(mask)
    old_log_prob, new_log_prob = (
        widened(each, torch.float32) for each in (old_log_prob, new_log_prob)
    )
    log_ratio = new_log_prob - old_log_prob
    if counted is not None and counted.shape == log_ratio.shape:
        log_ratio = log_ratio.masked_fill(~counted, 0)  # padding may be infinite, its slope not
    excess = masked_mean(torch.expm1(log_ratio) - log_ratio, counted)
    if low_variance:
        return excess
    slope_alone = (excess - excess.detach()).nan_to_num(0.0)  # far away, the exponential overflows
    return masked_mean(-log_ratio, counted).detach() + slope_alone


def log_prob(dist: PolicyT, action: Any) -> Tensor:
    """Return the log-probability of actions, joint over the parts of a tuple or dict.

    Args:
        dist: The distribution, or a dict or tuple of them.
        action: Parts in the same form; a tuple's may also be stacked along a last dimension, as
            Gymnasium's MultiDiscrete spaces have them.

    Returns:
        The batch's shape, in single precision at least.

    Raises:
        TrustRegionError: If the parts or their shapes do not fit.
        ValueError: If an action lies outside the support; torch says which.
    """
    if isinstance(dist, Distribution):
        shape = dist.batch_shape + dist.event_shape
        if shape and action.shape[-len(shape) :] != shape:
            raise TrustRegionError(
                f"The actions have shape {tuple(action.shape)}, and one for each of "
                f"{name_of(dist)} has {tuple(shape)}: they would broadcast. Reshape them."
            )
        wide = at_least_single(dist)
        return wide.log_prob(action if wide is dist else widened(action, torch.float32))
    if isinstance(action, Tensor) and not isinstance(dist, Mapping):
        action = action.unbind(-1)
    return _summed([log_prob(*pair) for _, *pair in paired(dist, action, "action", "")])


@torch.no_grad()
def sample(dist: PolicyT) -> Any:
    """Draw actions, without a graph.

    Args:
        dist: The distribution, or a dict or tuple of them.

    Returns:
        One action per element of the batch, in the same form.
    """
    if isinstance(dist, Distribution):
        return dist.sample()
    if isinstance(dist, Mapping):
        return {name: sample(part) for name, part in dist.items()}
    return tuple(sample(part) for part in dist)


def entropy(dist: PolicyT) -> Tensor:
    """Return the entropy in nats, joint over the parts of a tuple or dict.

    Args:
        dist: The distribution, or a dict or tuple of them.

    Returns:
        The batch's shape.

    Raises:
        TrustRegionError: If a family has no closed form.
    """
    if not isinstance(dist, Distribution):
        return _summed([entropy(part) for part in leaves(dist)])
    try:
        return at_least_single(dist).entropy()
    except NotImplementedError as error:
        raise TrustRegionError(
            f"The entropy of {name_of(dist)} has no closed form. Estimate it by the mean of "
            "-log_prob over its own samples."
        ) from error


def frozen(dist: PolicyT) -> PolicyT:
    """Return a copy to keep as the old policy, which shares neither graph nor memory.

    Args:
        dist: The distribution, or a dict or tuple of them.

    Returns:
        The same families, detached and cloned.

    Raises:
        TrustRegionError: If a parameter is NaN or outside its bounds, such as a scale of zero.
    """
    for part in leaves(dist):
        require_valid(part)
    memo: dict[int, Any] = {id(each): each.detach().clone() for each in tensors(dist)}
    for part in leaves(dist):
        for inner in made_of(part):
            memo |= {id(each): each for each in constant_transforms(inner)}
    return copy.deepcopy(dist, memo)


def _kl_of_batch(old: Any, new: Any, mask: Tensor | None) -> Tensor:
    """Return the joint KL of every element of the batch, the old policy's without a graph."""
    if any(each.requires_grad for each in tensors(old, "_cached_x_y")):
        raise TrustRegionError(
            "The old policy carries a graph. Pass frozen(policy(observations)), made before the "
            "step, as the first argument, and the new policy as the second."
        )
    return _joint_kl(old, new, None if mask is None else mask.dim(), "")


def _joint_kl(old: Any, new: Any, batch_dims: int | None, place: str) -> Tensor:
    """Return the KL per element of the batch, over all parts."""
    if isinstance(old, Distribution) and isinstance(new, Distribution):
        return _over_action(kl_of_family(old, new, place), new, batch_dims, place)
    if isinstance(old, Distribution) or isinstance(new, Distribution):
        raise TrustRegionError(
            f"The old policy{place} is {name_of(old)} and the new one {name_of(new)}. Compare "
            "distributions of one family and form."
        )
    return _summed(
        [
            _joint_kl(ours, theirs, batch_dims, here)
            for here, ours, theirs in paired(old, new, "new policy", place)
        ]
    )


def _over_action(kl: Tensor, dist: Distribution, batch_dims: int | None, place: str) -> Tensor:
    """Sum a KL over the dimensions that belong to the action."""
    if batch_dims is None:
        if kl.dim() > 1 and not dist.event_shape:
            shape = tuple(kl.shape)
            raise TrustRegionError(
                f"{name_of(dist)}{place} has batch shape {shape} and no event shape, so that "
                "dimensions of the action and of the batch look alike. Wrap it in "
                "Independent(dist, 1) if the last dimension is the action's; if every element is "
                f"an action of its own, pass mask=torch.ones({shape}, dtype=torch.bool)."
            )
        return kl
    if kl.dim() < batch_dims:
        raise TrustRegionError(
            f"The mask has {batch_dims} dimensions, and {name_of(dist)}{place} has batch shape "
            f"{tuple(kl.shape)}. Give the mask the batch's shape."
        )
    return kl.flatten(batch_dims).sum(-1) if kl.dim() > batch_dims else kl


def _summed(parts: Sequence[Tensor]) -> Tensor:
    if not parts:
        raise TrustRegionError("The policy has no parts. Give one distribution per part.")
    shapes = sorted({tuple(part.shape) for part in parts})
    if len(shapes) > 1:
        raise TrustRegionError(
            f"The parts of the policy have the batch shapes {shapes}. Wrap those with more "
            "dimensions in Independent, so that all have the batch's."
        )
    return torch.stack(list(parts)).sum(0)
