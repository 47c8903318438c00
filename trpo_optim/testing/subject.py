"""The policy under test: evaluated always from the same state, and moved along its parameters."""

from __future__ import annotations

import copy
import functools
import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from trpo_optim.closure import Objective
from trpo_optim.curvature import LocalModel, second_order
from trpo_optim.distribution_parts import leaves
from trpo_optim.distributions import frozen, log_prob, sample
from trpo_optim.parameter_vector import ParameterVector
from trpo_optim.report import TrustRegionError
from trpo_optim.testing.reference import Reference, reference, rows_of
from trpo_optim.transaction import Transaction

__all__ = ["Subject", "mapped", "module_of", "row_count", "select"]

_SEED = 20150707


class Subject:
    """A policy with its observations.

    Args:
        policy: From observations to a distribution, or a tuple or dict of them.
        observations: A tensor, or a tuple or dict of them, the batch first.
        parameters: What is trained.
        kl: From the old and the new distribution to their mean KL.
        actions: Taken at the observations; None: sampled.
        draws: Actions drawn per row where something is averaged over them.
    """

    def __init__(
        self,
        policy: Callable[[Any], Any],
        observations: Any,
        parameters: Iterable[Tensor],
        kl: Callable[[Any, Any], Tensor],
        actions: Any,
        draws: int,
    ) -> None:
        self.policy = policy
        self.observations = observations
        self.module = module_of(policy)
        self.parameters = tuple(each for each in parameters if each.requires_grad)
        self.kl = kl
        self.draws = draws
        self.rows = row_count(observations)
        self._given = actions
        self._buffers = [] if self.module is None else list(self.module.buffers())
        self._content = [each.clone() for each in self._buffers]

    @functools.cached_property
    def precise(self) -> Subject:
        """The same in double precision, or itself where the policy does not work in that."""
        if self.module is None:
            return self
        names = {id(each): name for name, each in self.module.named_parameters()}
        try:
            module = copy.deepcopy(self.module).double()
            policy = module if self.policy is self.module else getattr(module, self.policy.__name__)
            named = dict(module.named_parameters())
            parameters = [named[names[id(each)]] for each in self.parameters]
            observations = mapped(_doubled, self.observations)
            actions = None if self._given is None else mapped(_doubled, self._given)
            other = Subject(policy, observations, parameters, self.kl, actions, self.draws)
            works = all(
                each.dtype is torch.float64
                for each in (other.old_log_prob, self.kl(other.old, other.dist()))
            )
        except Exception:  # whatever a policy makes of double precision
            return self
        return other if works else self

    def raw(self, observations: Any) -> Any:
        """Evaluate the policy as it is, on a copy of observations."""
        return self.policy(mapped(Tensor.clone, observations))

    def dist(self, observations: Any = None) -> Any:
        """Evaluate the policy, with its graph, as ``steady`` does."""
        with torch.enable_grad():
            return self.steady(observations)

    def steady(self, observations: Any = None) -> Any:
        """Evaluate the policy from the buffers and the random state of the beginning."""
        for buffer, content in zip(self._buffers, self._content, strict=True):
            if not torch.equal(buffer, content):
                buffer.copy_(content)
        with torch.random.fork_rng(_devices(self.parameters)):
            torch.manual_seed(_SEED)
            return self.raw(self.observations if observations is None else observations)

    @functools.cached_property
    def old(self) -> Any:
        """The distribution at the parameters as they are."""
        return frozen(self.dist())

    @functools.cached_property
    def actions(self) -> Any:
        """One action for each observation."""
        return sample(self.old) if self._given is None else self._given

    @functools.cached_property
    def old_log_prob(self) -> Tensor:
        """Of the actions, one per row."""
        return log_prob(self.old, self.actions).detach()

    @functools.cached_property
    def advantages(self) -> Tensor:
        """Noise of mean zero, one per row."""
        noise = torch.randn(self.old_log_prob.shape).to(self.old_log_prob)
        return (noise - noise.mean()) / noise.std()

    @functools.cached_property
    def references(self) -> list[Reference]:
        """Reference actions of every part of the policy."""
        return [reference(leaf, self.draws) for leaf in leaves(self.old)]

    def joint_log_prob(self, dist: Any) -> Tensor:
        """Return the log-probability of the reference actions, (draws, rows)."""
        logs = [rows_of(leaf, each.actions) for leaf, each in self._parts(dist)]
        return sum(logs[1:], logs[0])

    def weights(self) -> Tensor:
        """Return the reference actions' weights, (draws, rows)."""
        factors = [each.weights for each in self.references]
        return math.prod(factors[1:], start=factors[0])

    def _parts(self, dist: Any) -> Iterator[tuple[Any, Reference]]:
        return zip(leaves(dist), self.references, strict=True)

    @functools.cached_property
    def vector(self) -> ParameterVector:
        """The parameters that the policy's log-probabilities depend on."""
        return ParameterVector(self.reached)

    @functools.cached_property
    def reached(self) -> tuple[Tensor, ...]:
        """The parameters that autograd reaches from the log-probabilities or the KL."""
        dist = self.dist()
        value = log_prob(dist, self.actions).sum() + _finite(self.kl(self.old, dist))
        if not value.requires_grad:
            return ()
        slopes = torch.autograd.grad(value, self.parameters, allow_unused=True)
        pairs = zip(self.parameters, slopes, strict=True)
        return tuple(parameter for parameter, slope in pairs if slope is not None)

    @contextmanager
    def at(self, step: Tensor) -> Iterator[None]:
        """Move the parameters by a step, (n,), and put them back."""
        origin = self.vector.gather([each.detach() for each in self.vector.parameters])
        try:
            self.vector.write(self.vector.scatter(origin + step))
            yield
        finally:
            self.vector.write(self.vector.scatter(origin))

    def closure(self, *, third: bool) -> Callable[[], Any]:
        """Return the optimizer's closure on the batch."""

        def values() -> Any:
            dist = self.steady()
            ratio = (log_prob(dist, self.actions) - self.old_log_prob).exp()
            pair = -(ratio * self.advantages).mean(), self.kl(self.old, dist)
            return (*pair, dist) if third else pair

        return values

    @contextmanager
    def model(self, *, third: bool) -> Iterator[LocalModel]:
        """Yield gradient and Fisher-vector products, as the optimizer takes them."""
        with Transaction(self.vector) as transaction, torch.no_grad():
            transaction.begin()
            yield second_order(Objective(self.closure(third=third), self.vector, transaction))

    @functools.cached_property
    def refusal(self) -> str:
        """Why the closure cannot be differentiated twice, or empty."""
        try:
            for third in (True, False):
                with self.model(third=third) as model:
                    model.product(model.gradient)
        except TrustRegionError as error:
            return str(error)
        return ""

    def direction(self, seed: int, kl: float = 0.5) -> Tensor:
        """Return a fixed random step, of such a length that to second order the KL is ``kl``.

        That is half the mean square change of log_prob, whatever the KL is said to be.
        """
        generator = torch.Generator().manual_seed(seed)
        pieces = [
            torch.randn(each.shape, generator=generator)
            * max(1e-3, float(each.detach().norm()))
            / max(1.0, each.numel() ** 0.5)
            for each in self.vector.parameters
        ]
        noise = torch.cat([each.reshape(-1) for each in pieces])
        noise = noise.to(dtype=self.vector.dtype, device=self.vector.device)
        small = 1e-3 if noise.dtype is torch.float64 else 1e-2
        with torch.no_grad(), self.at(small * noise):
            change = log_prob(self.dist(), self.actions) - self.old_log_prob
        bend = float(change.double().square().mean()) / small**2
        return noise * math.sqrt(2 * kl / bend) if bend > 0 else noise


def row_count(observations: Any) -> int:
    """Return the size of the batch."""
    if isinstance(observations, Tensor):
        return len(observations)
    parts = observations.values() if isinstance(observations, Mapping) else observations
    return row_count(next(iter(parts)))


def select(value: Any, rows: Tensor) -> Any:
    """Return some rows of observations or actions."""
    return mapped(lambda each: each[rows.to(each.device)], value)


def mapped(change: Callable[[Tensor], Tensor], value: Any) -> Any:
    """Return observations or actions with every tensor changed."""
    if isinstance(value, Tensor):
        return change(value)
    if isinstance(value, Mapping):
        return {name: mapped(change, each) for name, each in value.items()}
    return type(value)(mapped(change, each) for each in value)


def _doubled(value: Tensor) -> Tensor:
    return value.double() if value.is_floating_point() else value


def module_of(policy: Any) -> nn.Module | None:
    """Return the module that a policy is, or is a method of."""
    owner = getattr(policy, "__self__", policy)
    return owner if isinstance(owner, nn.Module) else None


def _devices(parameters: Iterable[Tensor]) -> list[torch.device]:
    return list({each.device for each in parameters if each.device.type == "cuda"})


def _finite(value: Tensor) -> Tensor:
    return value if value.isfinite() else value * 0
