"""The KL of two distributions of one family, with what torch's own closed forms leave to wish."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.distributions import (
    Bernoulli,
    Binomial,
    Categorical,
    Distribution,
    Independent,
    OneHotCategorical,
    TransformedDistribution,
    kl_divergence,
)
from torch.nn.functional import softplus

from trpo_optim.distributions.parts import name_of, tensors
from trpo_optim.errors import NoClosedFormError, TrustRegionError
from trpo_optim.torch_private import kl_of_bases, kl_rule

__all__ = ["kl_of_family"]

_WITHOUT_CLOSED_FORM = (
    "Use sampled_kl(old_log_prob, new_log_prob) on the batch's own actions instead, and return the "
    "new log-probabilities as the closure's third value; with policy_closure(), set sampled=True."
)


def kl_of_family(old: Distribution, new: Distribution, place: str) -> Tensor:
    """Return KL(old ‖ new) per element of the batch, in nats.

    Args:
        old: A distribution.
        new: One of the same family and shapes.
        place: Where in the policy they are, for messages.

    Returns:
        The batch's shape; without NaN for actions that are masked out.

    Raises:
        TrustRegionError: If families, shapes or transforms differ, or no closed form is known.
    """
    if old is new:
        raise TrustRegionError(
            f"The old and the new policy{place} are the same object, so that their KL is always "
            "zero. Keep frozen(policy(observations)) from before the step as the old one."
        )
    if type(old) is not type(new):
        raise TrustRegionError(
            f"The old policy{place} is {name_of(old)} and the new one {name_of(new)}: "
            "KL(old || new) needs one family."
        )
    if (old.batch_shape, old.event_shape) != (new.batch_shape, new.event_shape):
        raise TrustRegionError(
            f"The old {name_of(old)}{place} has batch shape {tuple(old.batch_shape)} and event "
            f"shape {tuple(old.event_shape)}, the new one {tuple(new.batch_shape)} and "
            f"{tuple(new.event_shape)}. Evaluate both on the same observations."
        )
    return _kl(old, new)


def _kl(old: Any, new: Any) -> Tensor:
    if isinstance(old, Independent) and isinstance(new, Independent):
        dims = range(-old.reinterpreted_batch_ndims, 0)
        if old.reinterpreted_batch_ndims == new.reinterpreted_batch_ndims:
            inner = kl_of_family(old.base_dist, new.base_dist, "")
            return inner.sum(list(dims)) if dims else inner
    if isinstance(old, OneHotCategorical):
        old, new = old._categorical, new._categorical
    if isinstance(old, Categorical):
        out = old.probs == 0
        change: Tensor = old.logits.masked_fill(out, 0) - new.logits.masked_fill(out, 0)
        return old.probs.mul(change).sum(-1)
    if isinstance(old, TransformedDistribution) and not _has_own_kl(old):
        learned = (each.requires_grad for each in tensors(new.transforms, "_cached_x_y"))
        if old.transforms != new.transforms or any(learned):
            raise NoClosedFormError(
                f"The old and the new {name_of(old)} have different or learned transforms, so "
                f"that their KL is not that of their bases. {_WITHOUT_CLOSED_FORM}"
            )
        return kl_of_family(old.base_dist, new.base_dist, "")
    if isinstance(old, Bernoulli | Binomial):
        trials: Tensor = _bernoulli_kl(old.logits, new.logits) * _trials(old, new)
        return trials
    try:
        kl: Tensor = kl_divergence(old, new)
    except NotImplementedError as error:
        raise NoClosedFormError(
            f"The KL of {name_of(old)} has no closed form. {_WITHOUT_CLOSED_FORM}"
        ) from error
    return kl


def _has_own_kl(dist: Distribution) -> bool:
    """Return whether a family has a closed form of its own, as Gumbel has and Weibull has not."""
    return kl_rule(type(dist), type(dist)) is not kl_of_bases


def _bernoulli_kl(old: Tensor, new: Tensor) -> Tensor:
    """Return the KL from logits, exact where probabilities round to 0 or 1, as torch's is not."""
    terms = []
    for sign in (1, -1):  # the event, and its absence
        weight = (sign * old).sigmoid()
        change = softplus(-sign * new) - softplus(-sign * old)
        terms.append(weight * change.masked_fill(weight == 0, 0))
    return torch.add(*terms)


def _trials(old: Any, new: Any) -> Any:
    if isinstance(old, Bernoulli):
        return 1
    if not torch.equal(old.total_count, new.total_count):
        raise TrustRegionError("The old and the new Binomial have different total counts.")
    return old.total_count
