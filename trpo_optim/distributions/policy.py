"""KL, log-probabilities, samples and entropy of a policy's distribution of any family."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.distributions import Categorical, Distribution

from trpo_optim.distributions.densities import for_density
from trpo_optim.distributions.frozen import PolicyT
from trpo_optim.distributions.joint import batch_dims_within, over_action, require_plain, summed
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
    is_single,
    leaves,
    name_of,
    paired,
    require_shapes,
    require_valid,
    tensors,
)
from trpo_optim.distributions.precision import widened
from trpo_optim.errors import TrustRegionError

__all__ = ["entropy", "joint_kl", "log_prob", "mean_kl", "sample"]


def mean_kl(
    old: PolicyT, new: PolicyT, mask: Tensor | None = None, *, per: Per = "token"
) -> Tensor:
    """Return the batch mean of the joint KL(old ‖ new), in nats.

    The joint KL is summed over the dimensions of an action and over the parts of a tuple or dict.
    Actions with logits of −inf in both distributions add nothing to the KL and to gradients. The KL
    of a tanh-squashed or otherwise transformed distribution is the KL of its base.

    Args:
        old: The distribution that acted, usually ``frozen``. It has no graph.
        new: A distribution with the same families and shapes.
        mask: True where an element counts (no padding), in the shape of the batch. Further
            dimensions of a distribution such as ``Normal`` belong to the action. None: all count.
        per: ``"token"``: the mean over all elements that count. ``"sequence"``: the mean over
            sequences, along the first dimension. The KL of a sequence is the sum over its elements
            that count.

    Returns:
        A scalar in float32 at least. In float64 if the family's formula cancels.

    Raises:
        TrustRegionError: If the distributions do not match, have no closed-form KL, move their
            support (Uniform, Pareto), or have ambiguous action dimensions (wrap them in
            ``Independent``), if ``old`` requires grad, or if ``mask`` or ``per`` does not fit.

    Example:
        >>> import torch
        >>> from torch.distributions import Independent, Normal
        >>> from trpo_optim import mean_kl
        >>> old = Independent(Normal(torch.zeros(4, 2), 1.0), 1)  # two-dimensional actions
        >>> new = Independent(Normal(torch.ones(4, 2), 1.0), 1)
        >>> mean_kl(old, new)
        tensor(1.)
    """
    require_per(per)
    counted = checked_mask(mask)
    kl = masked_mean(_kl_of_batch(old, new, counted), counted, per)
    if not kl.isfinite():  # the new policy's numbers are for the step to judge
        for part in leaves(old):
            require_valid(part)
    return kl


def joint_kl(
    old: PolicyT, new: PolicyT, mask: Tensor | None = None, *, per: Per = "token"
) -> Tensor:
    """Return the joint KL(old ‖ new) of every sample, in nats.

    ``mean_kl`` is its mean. With ``constraint="max"``, a closure returns this vector.

    Args:
        old: The distribution that acted, usually ``frozen``. It has no graph.
        new: A distribution with the same families and shapes.
        mask: True where an element counts, in the shape of the batch. None: all count.
        per: As for ``mean_kl``.

    Returns:
        A tensor in the batch's shape. With a mask: a vector of the elements that count. With
        ``per="sequence"``: a vector of the sequences that have such elements.

    Raises:
        TrustRegionError: As for ``mean_kl``.

    Example:
        >>> import torch
        >>> from torch.distributions import Independent, Normal
        >>> from trpo_optim import joint_kl
        >>> old = Independent(Normal(torch.zeros(3, 2), 1.0), 1)
        >>> new = Independent(Normal(torch.tensor([[0.0, 0.0], [1.0, 1.0], [2.0, 2.0]]), 1.0), 1)
        >>> joint_kl(old, new)
        tensor([0., 1., 4.])
    """
    require_per(per)
    counted = checked_mask(mask)
    kl = _kl_of_batch(old, new, counted)
    if per == "sequence":
        return of_sequences(kl, counted)
    if counted is not None:
        require_fit(counted, kl)
    return kl if counted is None else kl[counted]


def log_prob(dist: PolicyT, action: Any, mask: Tensor | None = None) -> Tensor:
    """Return the joint log-probability of actions, summed over the parts of a tuple or dict.

    A Categorical with several batch dimensions gives one number per element, such as every token.

    Args:
        dist: The distribution, or a dict or tuple of distributions.
        action: The actions in the same form. The parts of a tuple may also be stacked along a last
            dimension, as in Gymnasium's MultiDiscrete spaces.
        mask: As in ``mean_kl``.

    Returns:
        A tensor in the batch's shape, in float32 at least. It is 0 where the mask is false.

    Raises:
        TrustRegionError: If the parts, their shapes or the mask do not fit, or the action
            dimensions are ambiguous (wrap the distribution in ``Independent``).
        ValueError: If an action lies outside the support. torch raises it and says which.

    Example:
        >>> import torch
        >>> from torch.distributions import Categorical
        >>> from trpo_optim import log_prob
        >>> dist = (Categorical(logits=torch.zeros(3, 2)), Categorical(logits=torch.zeros(3, 4)))
        >>> actions = torch.tensor([[0, 3], [1, 2], [1, 0]])
        >>> log_prob(dist, actions).exp()
        tensor([0.1250, 0.1250, 0.1250])
    """
    return _where(mask, lambda batch_dims: _joint_log_prob(dist, action, batch_dims, ""))


@torch.no_grad()
def sample(dist: PolicyT) -> Any:
    """Draw actions, without a graph.

    Args:
        dist: The distribution, or a dict or tuple of distributions.

    Returns:
        One action per element of the batch, in the same form.

    Example:
        >>> import torch
        >>> from torch.distributions import Categorical, Independent, Normal
        >>> from trpo_optim import sample
        >>> stick = Independent(Normal(torch.zeros(3, 2), 1.0), 1)
        >>> actions = sample({"button": Categorical(logits=torch.zeros(3, 4)), "stick": stick})
        >>> {name: tuple(part.shape) for name, part in actions.items()}
        {'button': (3,), 'stick': (3, 2)}
    """
    if isinstance(dist, Distribution):  # one that is a dict, too, draws in a form of its own
        return dist.sample()
    if isinstance(dist, Mapping):
        return {name: sample(part) for name, part in dist.items()}
    return tuple(sample(part) for part in dist)


def entropy(dist: PolicyT, mask: Tensor | None = None) -> Tensor:
    """Return the joint entropy in nats, summed over the parts of a tuple or dict.

    Args:
        dist: The distribution, or a dict or tuple of distributions.
        mask: As in ``mean_kl``.

    Returns:
        A tensor in the batch's shape. It is 0 where the mask is false.

    Raises:
        TrustRegionError: If a family has no closed-form entropy, or the mask does not fit.

    Example:
        >>> import torch
        >>> from torch.distributions import Categorical
        >>> from trpo_optim import entropy
        >>> entropy(Categorical(logits=torch.zeros(2, 4)))  # ln 4
        tensor([1.3863, 1.3863])
    """
    return _where(mask, lambda batch_dims: _joint_entropy(dist, batch_dims))


def _where(mask: Tensor | None, compute: Callable[[int | None], Tensor]) -> Tensor:
    """Return one number per element of the batch, given its dimensions; 0 where a mask is false."""
    counted = checked_mask(mask)
    if counted is None:
        return compute(None)
    values = compute(counted.dim())
    require_fit(counted, values)
    return values.masked_fill(~counted, 0)


def _kl_of_batch(old: Any, new: Any, mask: Tensor | None) -> Tensor:
    """Return the joint KL of every element of the batch. The old policy must have no graph."""
    if any(each.requires_grad for each in tensors(old, "_cached_x_y")):
        raise TrustRegionError(
            "The old policy requires grad. Pass frozen(policy(observations)), made before the "
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
        f"The actions{place} have shape {tuple(action.shape)}, which would broadcast: "
        f"{name_of(dist)} needs shape {tuple(shape)}. Reshape them."
    )
    if not fits and dist.event_shape:
        raise error
    try:
        logs = for_density(dist).log_prob(widened(action, torch.float32))
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
        values: Tensor = for_density(dist).entropy()
    except NotImplementedError as error:
        raise TrustRegionError(
            f"The entropy of {name_of(dist)} has no closed form. Use the mean of -log_prob."
        ) from error
    return values if batch_dims is None else over_action(values, dist, batch_dims, "")
