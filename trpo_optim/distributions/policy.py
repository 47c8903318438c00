"""What a trust region needs of a policy's distribution, whatever its family."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.distributions import Categorical, Distribution

from trpo_optim.distributions.joint import (
    batch_dims_within,
    over_action,
    require_plain,
    summed,
)
from trpo_optim.distributions.kl import kl_of_family
from trpo_optim.distributions.masks import (
    Per,
    checked_mask,
    masked_mean,
    of_sequences,
    require_fit,
    require_per,
)
from trpo_optim.distributions.parts import (
    constant_transforms,
    inverses,
    is_single,
    leaves,
    made_of,
    name_of,
    paired,
    require_shapes,
    require_valid,
    tensors,
)
from trpo_optim.distributions.precision import at_least_single, widened
from trpo_optim.errors import TrustRegionError

__all__ = ["entropy", "frozen", "joint_kl", "log_prob", "mean_kl", "sample"]

PolicyT = TypeVar("PolicyT", bound="Distribution | Mapping[str, Any] | Sequence[Any]")
"""A distribution, or a dict or tuple of independent ones: one for each part of the action."""


def mean_kl(
    old: PolicyT, new: PolicyT, mask: Tensor | None = None, *, per: Per = "token"
) -> Tensor:
    """Return the batch mean of the joint KL(old ‖ new), in nats.

    Joint means summed over all that is one action: event dimensions, and the parts of a tuple or
    dict. Actions that are masked out by logits of −inf in both count for nothing, and so does what
    they do to gradients. Of a tanh-squashed or otherwise transformed distribution it is the KL of
    the base.

    Args:
        old: The distribution that acted, usually ``frozen``.
        new: One of the same families and shapes.
        mask: True where an element counts (no padding), of the shape of the batch. Further
            dimensions of a distribution such as ``Normal`` belong to the action. None: all count.
        per: ``"token"`` takes the mean over all elements that count. ``"sequence"`` takes it over
            sequences, which lie along the first dimension: the KL of one is the sum over those
            of its elements that count.

    Returns:
        A scalar, in single precision at least; in double where the family's formula cancels.

    Raises:
        TrustRegionError: If families, shapes or parts differ, no closed form is known, the policy
            moves its support (Uniform, Pareto), it is not plain which dimensions are the action's,
            the old one carries a graph, or the mask or ``per`` does not fit.
    """
    require_per(per)
    counted = None if mask is None else checked_mask(mask)
    kl = masked_mean(_kl_of_batch(old, new, counted), counted, per)
    if not kl.isfinite():  # the new policy's numbers are for the step to judge
        for part in leaves(old):
            require_valid(part)
    return kl


def joint_kl(
    old: PolicyT, new: PolicyT, mask: Tensor | None = None, *, per: Per = "token"
) -> Tensor:
    """Return the joint KL(old ‖ new) of every sample, in nats: ``mean_kl`` before its mean.

    What a closure returns so that ``constraint="max"`` can hold the largest of them.

    Args:
        old: The distribution that acted, usually ``frozen``.
        new: One of the same families and shapes.
        mask: True where an element counts, of the shape of the batch. None: all count.
        per: As for ``mean_kl``.

    Returns:
        The batch's shape; with a mask, a vector of the elements that count; with
        ``per="sequence"``, a vector of the sequences that have one.

    Raises:
        TrustRegionError: As ``mean_kl``.
    """
    require_per(per)
    counted = None if mask is None else checked_mask(mask)
    kl = _kl_of_batch(old, new, counted)
    if per == "sequence":
        return of_sequences(kl, counted)
    if counted is None:
        return kl
    require_fit(counted, kl)
    return kl[counted]


def log_prob(dist: PolicyT, action: Any, mask: Tensor | None = None) -> Tensor:
    """Return the log-probability of actions, joint over the parts of a tuple or dict.

    A Categorical of several batch dimensions gives one number per element: that of every token.

    Args:
        dist: The distribution, or a dict or tuple of them.
        action: Parts in the same form; a tuple's may also be stacked along a last dimension, as
            Gymnasium's MultiDiscrete spaces have them.
        mask: True where an element counts, of the shape of the batch. A further dimension of a
            distribution such as ``Normal`` belongs to the action. None: all count.

    Returns:
        The batch's shape, in single precision at least; zero where the mask is false.

    Raises:
        TrustRegionError: If the parts, their shapes or the mask do not fit, or it is not plain
            which dimensions are the action's.
        ValueError: If an action lies outside the support; torch says which.
    """
    counted = None if mask is None else checked_mask(mask)
    logs = _joint_log_prob(dist, action, None if counted is None else counted.dim(), "")
    if counted is None:
        return logs
    require_fit(counted, logs)
    return logs.masked_fill(~counted, 0)


@torch.no_grad()
def sample(dist: PolicyT) -> Any:
    """Draw actions, without a graph.

    Args:
        dist: The distribution, or a dict or tuple of them.

    Returns:
        One action per element of the batch, in the same form.
    """
    if isinstance(dist, Distribution):  # one that is a dict, too, draws in a form of its own
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
    return _joint_entropy(dist, None)


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
    for inverse in inverses(dist):  # a copy of one made by torch would forget what it inverts
        memo[id(inverse)] = copy.deepcopy(inverse.inv, memo).inv
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
    if is_single(old) and is_single(new):
        return over_action(kl_of_family(old, new, place), new, batch_dims, place)
    if is_single(old) or is_single(new):
        raise TrustRegionError(
            f"The old policy{place} is {name_of(old)} and the new one {name_of(new)}. Compare "
            "distributions of one family and form."
        )
    within = batch_dims_within(new, batch_dims)
    return summed(
        [
            _joint_kl(ours, theirs, within, here)
            for here, ours, theirs in paired(old, new, "new policy", place)
        ]
    )


def _joint_log_prob(dist: Any, action: Any, batch_dims: int | None, place: str) -> Tensor:
    """Return the log-probability per element of the batch, over all parts."""
    if is_single(dist):
        logs = _log_prob(dist, action, place)
        if batch_dims is not None:
            return over_action(logs, dist, batch_dims, place)
        if not isinstance(dist, Categorical):
            require_plain(dist.batch_shape, dist, place)
        return logs
    if isinstance(action, Tensor) and not isinstance(dist, Mapping):
        action = action.unbind(-1)
    within = batch_dims_within(dist, batch_dims)
    return summed(
        [
            _joint_log_prob(part, taken, within, here)
            for here, part, taken in paired(dist, action, "action", place)
        ]
    )


def _log_prob(dist: Distribution, action: Tensor, place: str) -> Tensor:
    """Return one number per action."""
    require_shapes(dist)
    shape = dist.batch_shape + dist.event_shape
    fits = not shape or action.shape[-len(shape) :] == shape
    error = TrustRegionError(
        f"The actions{place} have shape {tuple(action.shape)}, and one for each of "
        f"{name_of(dist)} has {tuple(shape)}: they would broadcast. Reshape them."
    )
    if not fits and dist.event_shape:
        raise error
    wide = at_least_single(dist)
    try:
        logs = wide.log_prob(action if wide is dist else widened(action, torch.float32))
    except (RuntimeError, ValueError) as refusal:
        if fits:
            raise
        raise error from refusal
    if not (fits or _is_one_per_action(logs, action, dist.batch_shape)):
        raise error
    return logs


def _is_one_per_action(logs: Tensor, action: Tensor, batch_shape: torch.Size) -> bool:
    """Return whether actions have dimensions that their family does not state, such as one-hots."""
    of_batch = logs.shape[logs.dim() - len(batch_shape) :] == batch_shape
    return of_batch and action.dim() > logs.dim() and action.shape[: logs.dim()] == logs.shape


def _joint_entropy(dist: Any, batch_dims: int | None) -> Tensor:
    """Return the entropy per element of the batch, over all parts."""
    if not is_single(dist):
        within = batch_dims_within(dist, batch_dims)
        parts = dist.values() if isinstance(dist, Mapping) else dist
        return summed([_joint_entropy(part, within) for part in parts])
    try:
        values: Tensor = at_least_single(dist).entropy()
    except NotImplementedError as error:
        raise TrustRegionError(
            f"The entropy of {name_of(dist)} has no closed form. Estimate it by the mean of "
            "-log_prob over its own samples."
        ) from error
    return values if batch_dims is None else over_action(values, dist, batch_dims, "")
