"""Distributions in a precision in which their KL does not drown in rounding."""

from __future__ import annotations

import copy
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.distributions import (
    Beta,
    Categorical,
    Dirichlet,
    Distribution,
    Gamma,
    Gumbel,
    LowRankMultivariateNormal,
    Poisson,
    Wishart,
)

__all__ = ["at_least_single", "for_kl", "given_by_probabilities", "in_double", "widened"]

_CANCELLING = (Beta, Dirichlet, Gamma, Gumbel, Poisson, LowRankMultivariateNormal, Wishart)
"""Families whose closed form is a small difference of large numbers."""

_DistributionT = TypeVar("_DistributionT", bound=Distribution)


def for_kl(dist: _DistributionT) -> _DistributionT:
    """Return a distribution in a precision that serves for its KL.

    Half precision becomes single, and families whose closed form cancels become double, except on
    MPS, which has no double precision.

    Args:
        dist: A distribution that is not made of others. Its tensors keep their graph.
    """
    wide: _DistributionT = _at_least(
        dist, torch.float64 if isinstance(dist, _CANCELLING) else torch.float32
    )
    return wide


def at_least_single(dist: _DistributionT) -> _DistributionT:
    """Return a distribution in single precision where it is in half, or else as it is."""
    wide: _DistributionT = _at_least(dist, torch.float32)
    return wide


def in_double(dist: _DistributionT) -> _DistributionT:
    """Return a distribution in double precision; on MPS, which has none, in single."""
    wide: _DistributionT = _at_least(dist, torch.float64)
    return wide


def _at_least(dist: Any, dtype: torch.dtype) -> Any:
    """Return a copy whose tensors have at least a precision, or the same where all have it."""
    changed: dict[str, Any] = {}
    wide: dict[int, Tensor] = {}  # one tensor may have two names
    for name, value in vars(dist).items():
        new = value
        if isinstance(value, Tensor):
            new = wide.setdefault(id(value), widened(value, dtype))
        elif isinstance(value, Distribution):
            new = _at_least(value, dtype)
        if new is not value:
            changed[name] = new
    if not changed:
        return dist
    if isinstance(dist, LowRankMultivariateNormal):  # it holds what it made of its parameters
        factor, diagonal = dist._unbroadcasted_cov_factor, dist._unbroadcasted_cov_diag
        loc, factor, diagonal = (widened(each, dtype) for each in (dist.loc, factor, diagonal))
        return LowRankMultivariateNormal(loc, factor, diagonal, validate_args=False)
    twin = copy.copy(dist)
    vars(twin).update(changed)
    if isinstance(twin, Categorical):
        _normalise(twin)
    else:
        _forget_derived(twin)
    return twin


def _forget_derived(dist: Distribution) -> None:
    """Forget probabilities that were derived from logits in a lower precision, or the reverse."""
    given = vars(dist).get("_param")
    for name in ("probs", "logits"):
        if given is not None and vars(dist).get(name, given) is not given:
            del vars(dist)[name]


def _normalise(dist: Categorical) -> None:
    """Normalise a Categorical afresh, which was normalised in a lower precision."""
    given = "probs" if given_by_probabilities(dist) else "logits"
    value = vars(dist)[given]
    for name in ("probs", "logits"):  # one of them may have been derived from the other
        vars(dist).pop(name, None)
    if given == "probs":
        dist._param = dist.probs = value / value.sum(-1, keepdim=True)
    else:
        dist._param = dist.logits = value.log_softmax(-1)


def given_by_probabilities(dist: Any) -> bool:
    """Return whether a Categorical, Bernoulli or Binomial was made of ``probs``, not ``logits``."""
    probabilities = vars(dist).get("probs")
    return probabilities is not None and probabilities is getattr(dist, "_param", None)


def widened(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """Return a tensor of at least a precision."""
    if not tensor.is_floating_point():
        return tensor
    if tensor.device.type == "mps":
        dtype = torch.float32
    wider = torch.promote_types(tensor.dtype, dtype)
    return tensor if tensor.dtype is wider else tensor.to(wider)
