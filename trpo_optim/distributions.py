"""What a trust region needs of a policy's distribution, whatever its family."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.distributions import (
    Binomial,
    Categorical,
    Distribution,
    Independent,
    OneHotCategorical,
    TransformedDistribution,
    kl_divergence,
)
from torch.distributions.constraints import Constraint
from torch.distributions.transforms import Transform

from trpo_optim.report import TrustRegionError

__all__ = [
    "entropy",
    "frozen",
    "leaves",
    "log_prob",
    "made_of",
    "mean_kl",
    "sample",
    "sampled_kl",
]

PolicyT = TypeVar("PolicyT", bound="Distribution | Mapping[str, Any] | Sequence[Any]")
"""A distribution, or a dict or tuple of independent ones: one for each part of the action."""

_WITHOUT_CLOSED_FORM = (
    "Use sampled_kl(old_log_prob, new_log_prob) on the batch's own actions instead, and return the "
    "new log-probabilities as the closure's third value."
)


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
        A scalar.

    Raises:
        TrustRegionError: If families, shapes or parts differ, no closed form is known, it is not
            plain which dimensions are the action's, or the mask does not fit.
    """
    counted = None if mask is None else _checked(mask)
    kl = _mean(_joint_kl(old, new, None if mask is None else mask.dim(), ""), counted)
    if not kl.isfinite():  # the new policy's numbers are for the step to judge
        for part in leaves(old):
            _require_valid(part)
    return kl


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
        TrustRegionError: If the shapes differ, or the mask does not fit.

    Source:
        Schulman, "Approximating KL divergence" (2020), joschu.net/blog/kl-approx.html.
    """
    if old_log_prob.shape != new_log_prob.shape:
        raise TrustRegionError(
            f"The old log-probabilities have shape {tuple(old_log_prob.shape)} and the new ones "
            f"{tuple(new_log_prob.shape)}. Take both of the same actions, one number for each."
        )
    counted = None if mask is None else _checked(mask)
    log_ratio = new_log_prob - old_log_prob
    if counted is not None and counted.shape == log_ratio.shape:
        log_ratio = log_ratio.masked_fill(~counted, 0)  # padding may be infinite, its slope not
    excess = _mean(torch.expm1(log_ratio) - log_ratio, counted)
    if low_variance:
        return excess
    return excess + (_mean(-log_ratio, counted) - excess).detach()


def log_prob(dist: PolicyT, action: Any) -> Tensor:
    """Return the log-probability of actions, joint over the parts of a tuple or dict.

    Args:
        dist: The distribution, or a dict or tuple of them.
        action: Parts in the same form; a tuple's may also be stacked along a last dimension, as
            Gymnasium's MultiDiscrete spaces have them.

    Returns:
        The batch's shape.

    Raises:
        TrustRegionError: If the parts do not fit.
        ValueError: If an action lies outside the support; torch says which.
    """
    if isinstance(dist, Distribution):
        return dist.log_prob(action)
    if isinstance(action, Tensor) and not isinstance(dist, Mapping):
        action = action.unbind(-1)
    return _summed([log_prob(*pair) for _, *pair in _paired(dist, action, "action", "")])


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
        parts = dist.values() if isinstance(dist, Mapping) else dist
        return _summed([entropy(part) for part in parts])
    try:
        return dist.entropy()
    except NotImplementedError as error:
        raise TrustRegionError(
            f"The entropy of {_name(dist)} has no closed form. Estimate it by the mean of "
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
        _require_valid(part)
    return copy.deepcopy(dist, {id(each): each.detach().clone() for each in _tensors(dist, set())})


def _joint_kl(old: Any, new: Any, batch_dims: int | None, place: str) -> Tensor:
    """Return the KL per element of the batch, over all parts."""
    if isinstance(old, Distribution) and isinstance(new, Distribution):
        return _over_action(_same_kind(old, new, place), old, new, batch_dims, place)
    if isinstance(old, Distribution) or isinstance(new, Distribution):
        raise TrustRegionError(
            f"The old policy{place} is {_name(old)} and the new one {_name(new)}. Compare "
            "distributions of one family and form."
        )
    return _summed(
        [
            _joint_kl(ours, theirs, batch_dims, here)
            for here, ours, theirs in _paired(old, new, "new policy", place)
        ]
    )


def _same_kind(old: Distribution, new: Distribution, place: str) -> Tensor:
    """Return the KL per element of the batch shape of two distributions of one family."""
    if old is new:
        raise TrustRegionError(
            f"The old and the new policy{place} are the same object, so that their KL is always "
            "zero. Keep frozen(policy(observations)) from before the step as the old one."
        )
    if type(old) is not type(new):
        raise TrustRegionError(
            f"The old policy{place} is {_name(old)} and the new one {_name(new)}: KL(old || new) "
            "needs one family."
        )
    if (old.batch_shape, old.event_shape) != (new.batch_shape, new.event_shape):
        raise TrustRegionError(
            f"The old {_name(old)}{place} has batch shape {tuple(old.batch_shape)} and event shape "
            f"{tuple(old.event_shape)}, the new one {tuple(new.batch_shape)} and "
            f"{tuple(new.event_shape)}. Evaluate both on the same observations."
        )
    return _kl(old, new)


def _kl(old: Any, new: Any) -> Tensor:
    """Return the KL of two distributions of one family, without NaN for what is masked out."""
    if isinstance(old, Independent) and isinstance(new, Independent):
        dims = range(-old.reinterpreted_batch_ndims, 0)
        if old.reinterpreted_batch_ndims == new.reinterpreted_batch_ndims:
            inner = _same_kind(old.base_dist, new.base_dist, "")
            return inner.sum(list(dims)) if dims else inner
    if isinstance(old, OneHotCategorical):
        old, new = old._categorical, new._categorical
    if isinstance(old, Categorical):
        out = old.probs == 0
        change: Tensor = old.logits.masked_fill(out, 0) - new.logits.masked_fill(out, 0)
        return old.probs.mul(change).sum(-1)
    if isinstance(old, TransformedDistribution):
        learned = (each.requires_grad for each in _tensors(new.transforms, set(), "_cached_x_y"))
        if old.transforms != new.transforms or any(learned):
            raise TrustRegionError(
                f"The old and the new {_name(old)} have different or learned transforms, so "
                f"that their KL is not that of their bases. {_WITHOUT_CLOSED_FORM}"
            )
        return _same_kind(old.base_dist, new.base_dist, "")
    if isinstance(old, Binomial) and not torch.equal(old.total_count, new.total_count):
        raise TrustRegionError("The old and the new Binomial have different total counts.")
    try:
        kl: Tensor = kl_divergence(old, new)
    except NotImplementedError as error:
        raise TrustRegionError(
            f"The KL of {_name(old)} has no closed form. {_WITHOUT_CLOSED_FORM}"
        ) from error
    return kl


def _over_action(
    kl: Tensor, old: Distribution, new: Distribution, batch_dims: int | None, place: str
) -> Tensor:
    """Sum a KL over the dimensions that belong to the action."""
    if batch_dims is None:
        if kl.dim() > 1 and not new.event_shape:
            shape = tuple(kl.shape)
            raise TrustRegionError(
                f"{_name(new)}{place} has batch shape {shape} and no event shape, so that "
                "dimensions of the action and of the batch look alike. Wrap it in "
                "Independent(dist, 1) if the last dimension is the action's; if every element is "
                f"an action of its own, pass mask=torch.ones({shape}, dtype=torch.bool)."
            )
        return kl
    if kl.dim() < batch_dims:
        raise TrustRegionError(
            f"The mask has {batch_dims} dimensions, and {_name(old)}{place} has batch shape "
            f"{tuple(kl.shape)}. Give the mask the batch's shape."
        )
    return kl.flatten(batch_dims).sum(-1) if kl.dim() > batch_dims else kl


def _paired(left: Any, right: Any, name: str, place: str) -> Iterator[tuple[str, Any, Any]]:
    """Yield the parts of two dicts or tuples side by side, and where they are."""
    if isinstance(left, Mapping) and isinstance(right, Mapping) and left.keys() == right.keys():
        for key in left:
            yield f"{place}[{key!r}]", left[key], right[key]
        return
    if _is_sequence(left) and _is_sequence(right) and len(left) == len(right):
        for index, pair in enumerate(zip(left, right, strict=True)):
            yield f"{place}[{index}]", *pair
        return
    raise TrustRegionError(
        f"The policy{place} is {_name(left)} and the {name} {_name(right)}: their parts do not fit."
    )


def _is_sequence(value: Any) -> bool:
    return isinstance(value, Sequence) and not isinstance(value, str)


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


def _checked(mask: Tensor) -> Tensor:
    """Return a mask as one of bools with something in it."""
    if mask.dtype is not torch.bool and bool(((mask != 0) & (mask != 1)).any()):
        raise TrustRegionError(
            f"The mask is {mask.dtype} with values other than 0 and 1. Pass a mask of bools."
        )
    chosen = mask.bool()
    if not chosen.any():
        raise TrustRegionError(
            f"The mask of shape {tuple(mask.shape)} is all false: there is nothing to average."
        )
    return chosen


def _mean(values: Tensor, mask: Tensor | None) -> Tensor:
    if mask is None:
        return values.mean()
    if mask.shape != values.shape:
        raise TrustRegionError(
            f"The mask has shape {tuple(mask.shape)} and the batch {tuple(values.shape)}."
        )
    return values.masked_fill(~mask, 0).sum() / mask.sum()


def _require_valid(dist: Distribution) -> None:
    """Check a distribution's parameters against their bounds, also where torch was told not to."""
    for inner in made_of(dist):
        for name, constraint in _constraints(inner).items():
            value = vars(inner).get(name)
            if isinstance(value, Tensor) and not bool(constraint.check(value).all()):
                found = value[value.isnan()] if bool(value.isnan().any()) else value
                raise TrustRegionError(
                    f"{_name(inner)} has {name} outside {constraint} (such as "
                    f"{float(found.min()):g}). Bound what the network gives (softplus, clamp, "
                    "exp), and look for NaN in its inputs and parameters."
                )


def _constraints(dist: Distribution) -> Mapping[str, Constraint]:
    return {} if isinstance(dist, Independent) else dist.arg_constraints


def made_of(dist: Distribution) -> Iterator[Distribution]:
    """Yield a distribution and those that it is made of."""
    yield dist
    for value in vars(dist).values():
        if isinstance(value, Distribution):
            yield from made_of(value)


def leaves(dist: Any) -> list[Distribution]:
    """Return the distributions that a policy is made of."""
    if isinstance(dist, Distribution):
        return [dist]
    parts = dist.values() if isinstance(dist, Mapping) else dist
    return [leaf for part in parts for leaf in leaves(part)]


def _tensors(value: Any, seen: set[int], without: str = "") -> Iterator[Tensor]:
    """Yield the tensors that make up a policy, but for those under one attribute's name."""
    if id(value) in seen:
        return
    seen.add(id(value))
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, Distribution | Transform | nn.Module):
        for name, each in vars(value).items():
            if name != without:
                yield from _tensors(each, seen, without)
    elif isinstance(value, Mapping | list | tuple):
        for each in value.values() if isinstance(value, Mapping) else value:
            yield from _tensors(each, seen, without)


def _name(value: Any) -> str:
    """Return what a policy is, in the words of its own class."""
    if isinstance(value, Independent):
        return f"Independent({_name(value.base_dist)})"
    if isinstance(value, Mapping):
        return f"a dict of {sorted(map(str, value))}"
    if _is_sequence(value):
        return f"a {type(value).__name__} of {len(value)}"
    return type(value).__name__
