"""The policy under test at its observations, evaluated always from the same state."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributions import Distribution, Independent

from trpo_optim.closure.random_state import random_state_kept
from trpo_optim.distributions import frozen, log_prob, sample
from trpo_optim.distributions.joint import draws_whole_actions
from trpo_optim.distributions.nesting import mapped
from trpo_optim.distributions.parts import leaves, tensors
from trpo_optim.errors import TrustRegionError
from trpo_optim.testing.observations import changed, require_observations

__all__ = ["Evaluated", "every_row", "module_of", "per_row"]

_SEED = 20150707

_TRIES = 30
"""How often an action is drawn again that its own family has no density of, such as tanh's ±1."""


class Evaluated:
    """A policy with its observations, evaluated always from the same state.

    Args:
        policy: From observations to a distribution, or a tuple or dict of them.
        observations: A tensor, or a tuple or dict of them, the batch first.
        parameters: What is trained.
        kl: From the old and the new distribution to their mean KL; None: ``mean_kl``, or where
            that has no closed form an estimate.
        actions: Taken at the observations; None: sampled.
        draws: Actions drawn per row where something is averaged over them.
        dtype: Of the tensors that the policy makes; None: torch's default.
    """

    def __init__(
        self,
        policy: Callable[[Any], Any],
        observations: Any,
        parameters: Iterable[Tensor],
        kl: Callable[[Any, Any], Tensor] | None,
        actions: Any,
        draws: int,
        *,
        dtype: torch.dtype | None = None,
    ) -> None:
        self.policy = policy
        self.observations = observations
        self.module = module_of(policy)
        self.parameters = tuple(each for each in parameters if each.requires_grad)
        self._kl = kl
        self._dtype = dtype
        self.draws = draws
        self._rows = require_observations(observations)
        self._given = actions
        self._buffers = [] if self.module is None else list(self.module.buffers())
        self._content = [each.clone() for each in self._buffers]

    @functools.cached_property
    def rows(self) -> int:
        """How many actions there are: as many as observations, where these are rows."""
        if self._rows is not None:
            return self._rows
        shape = leaves(self.dist())[0].batch_shape
        if not shape or shape[0] < 2:
            raise TrustRegionError(
                f"The policy has batch shape {tuple(shape)} at these observations. Pass "
                "observations that give at least two rows, batch first."
            )
        return shape[0]

    def names(self) -> dict[int, str]:
        """Return the names of the parameters, by their identity."""
        named = {} if self.module is None else dict(self.module.named_parameters())
        names = {id(each): f"parameter {index}" for index, each in enumerate(self.parameters)}
        return names | {id(each): name for name, each in named.items()}

    def raw(self, observations: Any) -> Any:
        """Evaluate the policy as it is, on a copy of observations."""
        return self.policy(changed(Tensor.clone, observations))

    def log_prob(self, dist: Any, actions: Any = None) -> Tensor:
        """Return one log-probability per row, joint over all that a row is.

        A sequence of tokens is one action.
        """
        chosen = self.actions if actions is None else actions
        return log_prob(per_row(dist), chosen, every_row(dist))

    def dist(self, observations: Any = None) -> Any:
        """Evaluate the policy, with its graph, as ``steady`` does."""
        with torch.enable_grad():
            return self.steady(observations)

    def steady(self, observations: Any = None) -> Any:
        """Evaluate the policy from the buffers and the random state of the beginning."""
        for buffer, content in zip(self._buffers, self._content, strict=True):
            if not torch.equal(buffer, content):
                buffer.copy_(content)
        usual = torch.get_default_dtype()
        with random_state_kept((each.device for each in self.parameters), seed=_SEED):
            try:
                torch.set_default_dtype(self._dtype or usual)
                return self.raw(self.observations if observations is None else observations)
            finally:
                torch.set_default_dtype(usual)

    @functools.cached_property
    def old(self) -> Any:
        """The distribution at the parameters as they are."""
        return frozen(self.dist())

    @functools.cached_property
    def actions(self) -> Any:
        """One action for each observation."""
        if self._given is not None:
            named = isinstance(self.old, Distribution) and isinstance(self.old, Mapping)
            return {name: self._given[name] for name in self.old} if named else self._given
        drawn = _drawn(self.old)
        for _ in range(_TRIES):
            on_edge = ~self.log_prob(self.old, drawn).isfinite()
            if not on_edge.any():
                break
            drawn = mapped(functools.partial(_replaced, on_edge), drawn, _drawn(self.old))
        return drawn

    @functools.cached_property
    def old_log_prob(self) -> Tensor:
        """Of the actions, one per row."""
        return self.log_prob(self.old).detach()

    def joint_leaves(self, dist: Any) -> list[Any]:
        """Return what a policy is made of, every part with one batch dimension."""
        found = leaves(dist)
        extra = [len(leaf.batch_shape) - 1 for leaf in found]
        pairs = zip(found, extra, strict=True)
        return [Independent(leaf, dims) if dims > 0 else leaf for leaf, dims in pairs]


def module_of(policy: Any) -> nn.Module | None:
    """Return the module that a policy is, or is a method of."""
    owner = getattr(policy, "__self__", policy)
    return owner if isinstance(owner, nn.Module) else None


def per_row(dist: Any) -> Any:
    """Return a policy whose sequences are one action per row each."""
    if isinstance(dist, Distribution) and isinstance(dist, Mapping):
        return dist  # it has a form of its own
    if isinstance(dist, Distribution):
        further = len(dist.batch_shape) - 1
        return Independent(dist, further) if further > 0 and draws_whole_actions(dist) else dist
    if isinstance(dist, Mapping):
        return {name: per_row(part) for name, part in dist.items()}
    return tuple(per_row(part) for part in dist)


def every_row(dist: Any) -> Tensor:
    """Return a mask that counts all rows: further dimensions belong to the action."""
    leaf = leaves(dist)[0]
    device = next(tensors(leaf), torch.empty(0)).device
    return torch.ones(leaf.batch_shape[:1], dtype=torch.bool, device=device)


def _drawn(dist: Any) -> Any:
    """Draw one action per row, in plain dicts where parts have names."""
    if isinstance(dist, Mapping):
        return {name: _drawn(part) for name, part in dist.items()}
    return mapped(torch.clone, sample(dist))  # a transform would remember its own


def _replaced(rows: Tensor, left: Tensor, right: Tensor) -> Tensor:
    """Return the left values, in some rows the right ones."""
    return torch.where(rows.view(-1, *[1] * (left.dim() - 1)), right, left)
