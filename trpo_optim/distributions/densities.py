"""Distributions whose log-probabilities and entropy do not drown in rounding."""

from __future__ import annotations

import copy
from functools import partial
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.distributions import (
    Beta,
    Binomial,
    Dirichlet,
    Distribution,
    FisherSnedecor,
    Gamma,
    LKJCholesky,
    LowRankMultivariateNormal,
    Multinomial,
    NegativeBinomial,
    Poisson,
    StudentT,
    VonMises,
    Wishart,
)

from trpo_optim.distributions.parts import tensors
from trpo_optim.distributions.precision import at_least_single, in_double, widened

__all__ = ["for_density"]

_CANCELLING = (
    Beta,
    Binomial,
    Dirichlet,
    FisherSnedecor,
    Gamma,
    LKJCholesky,
    LowRankMultivariateNormal,
    Multinomial,
    NegativeBinomial,
    Poisson,
    StudentT,
    VonMises,
    Wishart,
)
"""Families whose log-probability is a small difference of large numbers, such as of lgamma."""

_DistributionT = TypeVar("_DistributionT", bound=Distribution)


def for_density(dist: _DistributionT) -> _DistributionT:
    """Return a distribution of the same density, in a precision in which it does not cancel.

    Half precision becomes single. Families whose log-probability cancels compute it and the entropy
    in double precision and give them in single. What is made of such families, with transforms of
    any kind, stays in single precision itself.

    Args:
        dist: The distribution. Its tensors keep their graph.
    """
    return _accurate(at_least_single(dist))


def _accurate(dist: _DistributionT) -> _DistributionT:
    changed: dict[str, Any] = {}
    if isinstance(dist, _CANCELLING):
        wide = in_double(dist)
        if wide is not dist:
            vars(wide)["_validate_args"] = False  # an action is within bounds in its own precision
            changed["log_prob"] = partial(_log_prob, dist, wide)
            changed["entropy"] = partial(_entropy, dist, wide)
    else:
        for name, part in vars(dist).items():
            if isinstance(part, Distribution) and (accurate := _accurate(part)) is not part:
                changed[name] = accurate
    if not changed:
        return dist
    twin = copy.copy(dist)
    vars(twin).update(changed)
    return twin


def _log_prob(dist: Distribution, wide: Distribution, value: Tensor) -> Tensor:
    if dist._validate_args:
        dist._validate_sample(value)
    logs: Tensor = wide.log_prob(widened(value, torch.float64))
    return logs.to(torch.promote_types(_precision(dist), value.dtype))


def _entropy(dist: Distribution, wide: Distribution) -> Tensor:
    values: Tensor = wide.entropy()
    return values.to(_precision(dist))


def _precision(dist: Distribution) -> torch.dtype:
    """Return the precision of a distribution, which may keep derived numbers in a higher one."""
    dtypes = (each.dtype for each in tensors(dist) if each.is_floating_point())
    return min(dtypes, key=lambda dtype: torch.finfo(dtype).bits)
