"""Actions drawn from exp(log_prob): the reference for a policy's sampler and for its log_prob."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.distributions import Distribution, Independent, VonMises, biject_to, constraints

from trpo_optim.distributions.densities import for_density
from trpo_optim.testing.resolution import resolved

__all__ = ["Reference", "reference", "rows_of", "sampled_reference"]

_FREEDOM = 4.0
"""Degrees of freedom of the proposal: tails heavier than a policy's."""

_FEWEST = 16
"""Draws of a row that must count."""

_WIDEST = 64
"""Most values of a discrete action that are counted one by one."""


@dataclass(frozen=True)
class Reference:
    """Weighted actions of one distribution.

    Attributes:
        actions: Shape (draws, *batch, *event). In the place of one of weight 0 there is another of
            its row: log_prob may be infinite there, which no factor of 0 takes out of a gradient.
        weights: Shape (draws, rows); of mean 1 if exp(log_prob) integrates to 1.
        inside: Which lie where most samples do, shape (draws, rows).
        features: What is compared with the sampler's: of the reference's and of as many sampled
            actions, shape (draws, rows, features) each.
        decided: Whether this is a reference; otherwise it is the sampler itself.
        lost: The share of sampled actions that rounding does not resolve, such as at the edge of
            the support.
    """

    actions: Tensor
    weights: Tensor
    inside: Tensor
    features: tuple[Tensor, Tensor]
    decided: bool = True
    lost: float = 0.0

    def __post_init__(self) -> None:
        """Replace the actions that do not count."""
        object.__setattr__(self, "actions", _counted(self.actions, self.weights))

    @property
    def serves(self) -> bool:
        """Whether so many of the draws count, (Σw)² / Σw², that averages mean something."""
        count = self.weights.sum(0).square() / self.weights.square().sum(0)
        return float(count.median()) >= _FEWEST


def _counted(actions: Tensor, weights: Tensor) -> Tensor:
    """Return actions, those of weight 0 replaced by the one of most weight in their row."""
    if bool((weights > 0).all()):
        return actions
    flat = actions.reshape(*weights.shape, -1)
    best = flat[weights.argmax(0), torch.arange(flat.shape[1], device=flat.device)]
    return torch.where((weights > 0)[..., None], flat, best).reshape(actions.shape)


def reference(leaf: Distribution, draws: int) -> Reference:
    """Draw actions from a distribution by its log-density alone.

    Discrete actions are enumerated. Continuous ones come from a multivariate t-distribution in the
    unconstrained coordinates of the support, fitted to samples, and carry importance weights.

    Args:
        leaf: The distribution.
        draws: Actions per row.

    Returns:
        The actions; where the support is not known, the sampler's own.
    """
    with torch.no_grad():
        try:
            support: Any = leaf.support
            return _enumerated(leaf, draws) if support.is_discrete else _weighted(leaf, draws)
        except (NotImplementedError, ValueError):  # no support, or not all of its density
            return sampled_reference(leaf, draws)


@torch.no_grad()
def sampled_reference(leaf: Distribution, draws: int) -> Reference:
    """Return the sampler's own actions for a reference.

    Args:
        leaf: The distribution.
        draws: Actions per row.
    """
    actions = leaf.sample((draws,))
    finite = rows_of(leaf, actions).isfinite()
    ones = torch.ones_like(finite, dtype=torch.float64)
    pair = ones[..., None], ones[..., None]
    lost = 1 - float(finite.double().mean())
    return Reference(actions, ones * finite, finite, pair, decided=False, lost=lost)


def rows_of(leaf: Any, actions: Tensor) -> Tensor:
    """Return log-probabilities of reference actions, (draws, rows), in double precision."""
    logs: Tensor = for_density(leaf).log_prob(actions)
    return logs.double().reshape(len(actions), math.prod(leaf.batch_shape))


def _weighted(leaf: Distribution, draws: int) -> Reference:
    to_support = biject_to(_support(leaf))
    rows = math.prod(leaf.batch_shape)

    def flat(actions: Tensor) -> Tensor:
        inner: Tensor = to_support.inv(actions)
        return inner.double().reshape(len(actions), rows, -1)

    samples = leaf.sample((draws,))
    shape = to_support.inv(samples).shape[1:]
    fitted, compared = flat(leaf.sample((draws,))), flat(samples)
    fitted = fitted.nan_to_num(0.0, 30.0, -30.0)
    size = fitted.shape[-1]
    mean = fitted.mean(0)
    centred = (fitted - mean).transpose(0, 1)
    covariance = centred.mT @ centred / draws
    spread = covariance.diagonal(dim1=-2, dim2=-1).mean(-1)[:, None, None]
    identity = torch.eye(size, dtype=covariance.dtype, device=covariance.device)
    root = torch.linalg.cholesky(1.1 * covariance + (1e-6 * spread + 1e-12) * identity)
    normal = torch.randn(draws, rows, size, dtype=root.dtype, device=root.device)
    gamma = torch.distributions.Chi2(root.new_full((draws, rows, 1), _FREEDOM)).sample()
    standard = normal * (_FREEDOM / gamma).sqrt()
    points = mean + (root @ standard.unsqueeze(-1)).squeeze(-1)
    proposal = (
        math.lgamma((_FREEDOM + size) / 2)
        - math.lgamma(_FREEDOM / 2)
        - 0.5 * size * math.log(_FREEDOM * math.pi)
        - root.diagonal(dim1=-2, dim2=-1).log().sum(-1)
        - 0.5 * (_FREEDOM + size) * (standard.square().sum(-1) / _FREEDOM).log1p()
    )
    inner = points.reshape(draws, *shape).to(samples.dtype)
    actions = to_support(inner)
    slope = (
        to_support.log_abs_det_jacobian(inner, actions).double().reshape(draws, rows, -1).sum(-1)
    )
    density = rows_of(leaf, actions)
    weights = (density + slope - proposal).exp().nan_to_num(0.0, 0.0, 0.0)  # at the very edge
    scale = covariance.diagonal(dim1=-2, dim2=-1).sqrt() + 1e-12

    def features(points: Tensor, density: Tensor) -> Tensor:
        place = ((points - mean) / scale).clamp(-10, 10)
        return torch.cat([place, place.square(), density.clamp(-1e3, 1e3)[..., None]], -1)

    def place(actions: Tensor) -> Tensor:
        there = (flat(actions) - mean) / scale
        return torch.cat([there, rows_of(leaf, actions)[..., None]], -1)

    def logs(actions: Tensor) -> Tensor:
        return rows_of(leaf, actions)[..., None]

    support = _support(leaf)
    lost = 1 - float(resolved(place, samples, support).double().mean())
    return Reference(
        actions,
        weights * resolved(logs, actions, support),
        ((points - mean).abs() <= 3 * scale).all(-1),
        (features(points, density), features(compared, rows_of(leaf, samples))),
        lost=lost,
    )


def _support(leaf: Distribution) -> Any:
    """Return where actions are drawn, which is one turn of a circle that torch gives as a line."""
    base: Any = leaf
    while isinstance(base, Independent):
        base = base.base_dist
    if not isinstance(base, VonMises):
        return leaf.support
    turn = constraints.interval(-math.pi, math.pi)
    return constraints.independent(turn, len(leaf.event_shape))


def _enumerated(leaf: Distribution, draws: int) -> Reference:
    base = leaf
    while isinstance(base, Independent):
        base = base.base_dist
    values = _values(base)
    shape = values.shape[1:]
    elements = math.prod(base.batch_shape)
    logs = for_density(base).log_prob(values).double().reshape(len(values), elements)
    mass = logs.exp().sum(0)
    probabilities = (logs.exp() / mass).T.nan_to_num(1 / len(values))
    picked = torch.multinomial(probabilities, draws, replacement=True)  # (elements, draws)
    flat = values.reshape(len(values), elements, -1)
    actions = flat.gather(0, picked.T[..., None].expand(-1, -1, flat.shape[-1]))
    actions = actions.reshape(draws, *shape)
    rows = math.prod(leaf.batch_shape)
    weights = mass.reshape(rows, -1).prod(-1).expand(draws, rows)
    sampled = leaf.sample((draws,))

    def features(actions: Tensor) -> Tensor:
        place = actions.double().reshape(draws, rows, -1)
        density = rows_of(leaf, actions).clamp(-1e3, 1e3)[..., None]
        if len(values) > _WIDEST or base.event_shape:
            return torch.cat([place, place.square(), density], -1)
        counts = [(place == value).double().mean(-1) for value in flat[:, 0, 0].double()]
        return torch.cat([torch.stack(counts, -1), density], -1)

    everywhere = torch.ones_like(weights, dtype=torch.bool)
    return Reference(actions, weights, everywhere, (features(actions), features(sampled)))


def _values(base: Distribution) -> Tensor:
    """Return all values of a discrete distribution, (values, *batch, *event)."""
    if base.has_enumerate_support:
        values: Tensor = base.enumerate_support()
        return values
    support: Any = base.support
    if isinstance(support, type(constraints.nonnegative_integer)):
        most = float((base.mean + 12 * base.variance.sqrt()).max()) + 20
        counts = torch.arange(math.ceil(most), dtype=base.mean.dtype, device=base.mean.device)
        return counts.view(-1, *[1] * len(base.batch_shape)).expand(-1, *base.batch_shape)
    raise NotImplementedError
