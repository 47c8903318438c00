"""The KL of two distributions of one family, corrected where torch has no exact closed form."""

from __future__ import annotations

import math
from typing import Any, cast

import torch
from torch import Tensor
from torch.distributions import (
    Bernoulli,
    Binomial,
    Categorical,
    Distribution,
    Geometric,
    Independent,
    OneHotCategorical,
    Pareto,
    TransformedDistribution,
    Uniform,
    kl_divergence,
)
from torch.nn.functional import softplus

from trpo_optim.distributions.closed_forms import CLOSED_FORMS
from trpo_optim.distributions.constants import alike, learned
from trpo_optim.distributions.parts import name_of, require_shapes
from trpo_optim.distributions.precision import (
    at_least_single,
    for_kl,
    given_by_probabilities,
    widened,
)
from trpo_optim.errors import NoClosedFormError, TrustRegionError
from trpo_optim.torch_private import kl_of_bases, kl_rule

__all__ = ["kl_of_family"]

_WITHOUT_CLOSED_FORM = (
    "Use sampled_kl(old_log_prob, new_log_prob) on the batch's own actions instead, and return the "
    "new log-probabilities as the closure's third value. With policy_closure(), set sampled=True."
)

_SUPPORT: dict[type[Distribution], tuple[str, ...]] = {
    Uniform: ("low", "high"),
    Pareto: ("scale",),
}
"""The parameters that move a family's support."""


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
            f"The old and the new policy{place} are the same object, so their KL is always zero. "
            "Keep frozen(policy(observations)) from before the step as the old policy."
        )
    if type(old) is not type(new):
        raise TrustRegionError(
            f"The old policy{place} is {name_of(old)} and the new one {name_of(new)}. "
            "KL(old || new) needs one family: return the same family from both."
        )
    require_shapes(new)
    if (old.batch_shape, old.event_shape) != (new.batch_shape, new.event_shape):
        raise TrustRegionError(
            f"The old {name_of(old)}{place} has batch shape {tuple(old.batch_shape)} and event "
            f"shape {tuple(old.event_shape)}, the new one {tuple(new.batch_shape)} and "
            f"{tuple(new.event_shape)}. Evaluate both on the same observations."
        )
    if isinstance(old, Categorical):
        before, after = (
            (each.probs if given_by_probabilities(each) else each.logits).shape[-1]
            for each in (old, cast("Categorical", new))
        )
        if before != after:
            raise TrustRegionError(
                f"The old {name_of(old)}{place} has {before} actions and the new one {after}. "
                "Return as many logits from both."
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
        return _categorical_kl(old, new)
    if isinstance(old, TransformedDistribution) and not _has_own_kl(old):
        if learned(new.transforms) or not alike(old.transforms, new.transforms):
            raise NoClosedFormError(
                f"The old and the new {name_of(old)} have different or learned transforms, so "
                f"their KL is not the KL of their bases. {_WITHOUT_CLOSED_FORM}"
            )
        return kl_of_family(old.base_dist, new.base_dist, "")
    if isinstance(old, Bernoulli | Binomial):
        trials: Tensor = _bernoulli_kl(old, new) * _trials(old, new)
        return trials
    if isinstance(old, Geometric):
        return _bernoulli_kl(*map(_trial, (old, new))) / _chance(_trial(old), 1)
    _require_fixed_support(old, new)
    old, new = for_kl(old), for_kl(new)
    if type(old) in CLOSED_FORMS:
        return CLOSED_FORMS[type(old)](old, new)
    try:
        kl: Tensor = kl_divergence(old, new)
    except NotImplementedError as error:
        raise NoClosedFormError(
            f"torch knows no closed form of the KL of {name_of(old)}. {_WITHOUT_CLOSED_FORM} If "
            "there is one, register it by torch.distributions.kl.register_kl."
        ) from error
    return kl


def _has_own_kl(dist: Distribution) -> bool:
    """Return whether a family has a closed form of its own, as Gumbel has and Weibull has not."""
    return kl_rule(type(dist), type(dist)) is not kl_of_bases


def _categorical_kl(old: Categorical, new: Categorical) -> Tensor:
    """Return the KL; infinite where the new policy rules out what the old one does."""
    old, new = at_least_single(old), at_least_single(new)
    out = _never(old.probs, new)
    change = _log_probabilities(old, out) - _log_probabilities(new, out)
    return old.probs.mul(change).sum(-1)


def _never(chance: Tensor, new: Any) -> Tensor:
    """Return where the old policy's probabilities add nothing to the KL.

    Where probabilities are given, the slope of ln p is 1/p, which is infinite for the denormal p of
    a softmax.
    """
    return chance <= (torch.finfo(chance.dtype).tiny if given_by_probabilities(new) else 0)


def _log_probabilities(dist: Categorical, out: Tensor) -> Tensor:
    """Return ln p, zero where ``out`` is true.

    Where probabilities were given, torch's ``logits`` are those of probabilities of ε or more.
    """
    logs = dist.logits.masked_fill(out, 0)
    return _exact_where_small(dist.probs, logs, out) if given_by_probabilities(dist) else logs


def _exact_where_small(probabilities: Tensor, logs: Tensor, out: Tensor) -> Tensor:
    """Return ``logs``, and ln p itself where torch has replaced p by ε."""
    small = (probabilities < torch.finfo(probabilities.dtype).eps) & ~out
    if not small.any():
        return logs
    return torch.where(small, probabilities.masked_fill(~small, 1).to(logs).log(), logs)


def _bernoulli_kl(old: Any, new: Any) -> Tensor:
    """Return the KL from logits, exact where probabilities round to 0 or 1, as torch's is not."""
    terms = []
    for sign in (1, -1):  # the event, and its absence
        weight = _chance(old, sign)
        out = _never(weight, new)
        change = _log_chance(old, sign, out) - _log_chance(new, sign, out)
        terms.append(weight * change)
    return torch.add(*terms)


def _chance(dist: Any, sign: int) -> Tensor:
    """Return the probability of a Bernoulli's event, or of its absence where the sign is −1."""
    if given_by_probabilities(dist):
        chance: Tensor = widened(dist.probs, torch.float32)
        return chance if sign > 0 else 1 - chance
    return (sign * widened(dist.logits, torch.float32)).sigmoid()


def _log_chance(dist: Any, sign: int, out: Tensor) -> Tensor:
    """Return the logarithm of that, zero where ``out`` is true."""
    if given_by_probabilities(dist):  # torch's logits are those of ε to 1 - ε
        chance = widened(dist.probs, torch.float32).masked_fill(out, 0.5)
        logs = chance.log() if sign > 0 else (-chance).log1p()
    else:
        logs = -softplus(-sign * widened(dist.logits, torch.float32))
    return logs.masked_fill(out, 0)


def _trial(dist: Any) -> Bernoulli:
    """Return one trial of a Geometric, by the parameter that it was made of."""
    known = {name: vars(dist)[name] for name in ("probs", "logits") if name in vars(dist)}
    if len(known) == 2:  # one was derived; logits that are derived are those of ε to 1 - ε
        logits = known["logits"]
        derived = bool((logits.abs() <= -math.log(torch.finfo(logits.dtype).eps)).all())
        del known["logits" if derived else "probs"]
    given = {name: widened(value, torch.float64) for name, value in known.items()}
    return Bernoulli(**given, validate_args=False)


def _require_fixed_support(old: Any, new: Any) -> None:
    """Refuse families whose KL is infinite in one direction, wherever their support may move."""
    for name in _SUPPORT.get(type(old), ()):
        before, after = getattr(old, name), getattr(new, name)
        if after.requires_grad or not torch.equal(before, after):
            raise TrustRegionError(
                f"The policy moves the support of its {name_of(old)} ({name}). The KL is infinite "
                "wherever the support shrinks, however little, so no trust region exists. Use a "
                "family with a fixed support: Beta on an interval, Gamma on a half-line."
            )


def _trials(old: Any, new: Any) -> Any:
    if isinstance(old, Bernoulli):
        return 1
    if not torch.equal(old.total_count, new.total_count):
        raise TrustRegionError(
            "The old and the new Binomial have different total counts. Give both the same."
        )
    return old.total_count
