"""Closed forms of the KL that keep their digits where old and new are near, as torch's do not."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.distributions import (
    Cauchy,
    ContinuousBernoulli,
    Distribution,
    Exponential,
    MultivariateNormal,
    Normal,
    Poisson,
    Wishart,
)

from trpo_optim.distributions.precision import given_by_probabilities, widened
from trpo_optim.torch_private import squared_distance

__all__ = ["CLOSED_FORMS"]


def _normal_kl(old: Normal, new: Normal) -> Tensor:
    """Return the KL by the relative change of the variance, which near 0 is not rounded away."""
    relative = (old.scale - new.scale) / new.scale
    change = relative * (relative + 2)
    near = change.abs() < 0.5
    far = 2 * (old.scale.log() - new.scale.log())
    logs = torch.where(near, change.masked_fill(~near, 0).log1p(), far)
    shift = (old.loc - new.loc) / new.scale
    return 0.5 * (shift.square() + (change - logs))


def _multivariate_normal_kl(old: MultivariateNormal, new: MultivariateNormal) -> Tensor:
    """Return the KL by the difference of the Cholesky factors, which has no large terms.

    With E = L_new⁻¹ (L_old − L_new), ½ tr((1 + E)(1 + E)ᵀ) − ½ d − ln det(1 + E) is
    ½ ‖E‖² + tr E − ln det(1 + E), where the determinant is the product of the diagonal.
    """
    ours, theirs = old._unbroadcasted_scale_tril, new._unbroadcasted_scale_tril
    change = torch.linalg.solve_triangular(theirs, ours - theirs, upper=False)
    shift: Tensor = squared_distance(theirs, old.loc - new.loc)
    squares: Tensor = change.square().sum((-2, -1)) + shift
    return 0.5 * squares + _excess(ours.diagonal(0, -2, -1), theirs.diagonal(0, -2, -1)).sum(-1)


def _cauchy_kl(old: Cauchy, new: Cauchy) -> Tensor:
    """Return the KL in units of the new scale, whose square may be too small or large a number.

    Source:
        F. Chyzak, F. Nielsen, "A closed-form formula for the Kullback-Leibler divergence between
        Cauchy distributions" (2019), arXiv:1905.10965.
    """
    ratio = old.scale / new.scale
    change, shift = (old.scale - new.scale) / new.scale, (old.loc - new.loc) / new.scale
    return ((change.square() + shift.square()) / (4 * ratio)).log1p()


def _exponential_kl(old: Exponential, new: Exponential) -> Tensor:
    return _excess(new.rate, old.rate)


def _excess(value: Tensor, base: Tensor) -> Tensor:
    """Return r − 1 − ln r of a ratio of positive numbers, by its distance from 1."""
    change = (value - base) / base
    near = change.abs() < 0.5
    logs = torch.where(near, change.masked_fill(~near, 0).log1p(), value.log() - base.log())
    return change - logs


def _poisson_kl(old: Poisson, new: Poisson) -> Tensor:
    """Return the KL, also where the old rate is 0."""
    logs = new.rate.masked_fill(old.rate == 0, 1).log()
    return torch.xlogy(old.rate, old.rate) - old.rate * logs - old.rate + new.rate


def _continuous_bernoulli_kl(old: Any, new: Any) -> Tensor:
    """Return the KL of x ↦ exp(ηx − A(η)) on [0, 1] in double precision: A cancels."""
    ours, theirs = (_logit(each) for each in (old, new))
    spread, mean = _log_partition(ours)
    return (_log_partition(theirs)[0] - spread) - mean * (theirs - ours)


def _logit(dist: Any) -> Tensor:
    if not given_by_probabilities(dist):
        return widened(dist.logits, torch.float64)
    chance = widened(dist.probs, torch.float64)
    return chance.log() - (-chance).log1p()


def _log_partition(eta: Tensor) -> tuple[Tensor, Tensor]:
    """Return A(η) = ln((e^η − 1)/η) and A'(η)."""
    small = eta.abs() < 1e-2
    safe = torch.where(small, 1.0, eta)
    size = safe.abs()
    wide = torch.relu(safe) + (-(-size).exp()).log1p() - size.log()
    slope = -(-safe).expm1().reciprocal() - 1 / safe
    square = eta.square()
    narrow = eta / 2 + square / 24 - square.square() / 2880
    near = 0.5 + eta / 12 - eta * square / 720
    return torch.where(small, narrow, wide), torch.where(small, near, slope)


def _wishart_kl(old: Wishart, new: Wishart) -> Tensor:
    """Return the KL, element by element of the batch, as torch's rule does not.

    Source:
        W. D. Penny, "KL-Divergences of Normal, Gamma, Dirichlet and Wishart densities" (2001).
    """
    size = old.event_shape[-1]
    ours, theirs = old._unbroadcasted_scale_tril, new._unbroadcasted_scale_tril
    ratio = torch.linalg.solve_triangular(theirs, ours, upper=False)
    trace = ratio.square().sum((-2, -1))
    log_det = 2 * (ours.diagonal(0, -2, -1).log() - theirs.diagonal(0, -2, -1).log()).sum(-1)
    halves = torch.arange(size, dtype=old.df.dtype, device=old.df.device) / 2
    spread = (old.df.unsqueeze(-1) / 2 - halves).digamma().sum(-1)
    kl: Tensor = (
        -new.df / 2 * log_det
        + old.df / 2 * (trace - size)
        + torch.mvlgamma(new.df / 2, size)
        - torch.mvlgamma(old.df / 2, size)
        + (old.df - new.df) / 2 * spread
    )
    return kl


CLOSED_FORMS: dict[type[Distribution], Callable[[Any, Any], Tensor]] = {
    Cauchy: _cauchy_kl,
    ContinuousBernoulli: _continuous_bernoulli_kl,
    Exponential: _exponential_kl,
    MultivariateNormal: _multivariate_normal_kl,
    Normal: _normal_kl,
    Poisson: _poisson_kl,
    Wishart: _wishart_kl,
}
"""Families whose rule in torch cancels or is undefined where the KL is small."""
