"""The policy under test: evaluated always from the same state, and moved along its parameters."""

from __future__ import annotations

import copy
import functools
import math
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from trpo_optim.closure.evaluation import Objective
from trpo_optim.closure.parameters import ParameterVector
from trpo_optim.closure.random_state import random_state_kept
from trpo_optim.closure.transaction import Transaction
from trpo_optim.curvature.local_model import LocalModel, second_order
from trpo_optim.distributions import frozen, log_prob, mean_kl, sample
from trpo_optim.distributions.nesting import mapped
from trpo_optim.distributions.parts import leaves
from trpo_optim.errors import NoClosedFormError, TrustRegionError
from trpo_optim.testing.averages import average
from trpo_optim.testing.observations import require_observations
from trpo_optim.testing.reference import Reference, reference, rows_of, sampled_reference

__all__ = ["Subject", "module_of"]

_SEED = 20150707


class Subject:
    """A policy with its observations.

    Args:
        policy: From observations to a distribution, or a tuple or dict of them.
        observations: A tensor, or a tuple or dict of them, the batch first.
        parameters: What is trained.
        kl: From the old and the new distribution to their mean KL; None: ``mean_kl``, or where
            that has no closed form an estimate.
        actions: Taken at the observations; None: sampled.
        draws: Actions drawn per row where something is averaged over them.
        double: Whether tensors that the policy makes are of double precision.
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
        double: bool = False,
    ) -> None:
        self.policy = policy
        self.observations = observations
        self.module = module_of(policy)
        self.parameters = tuple(each for each in parameters if each.requires_grad)
        self._kl = kl
        self._double = double
        self.draws = draws
        self.rows = require_observations(observations)
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
            other = Subject(
                policy, observations, parameters, self._kl, actions, self.draws, double=True
            )
            kl = other.kl(other.dist())
            works = {other.old_log_prob.dtype, kl.dtype} == {torch.float64}
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
        usual = torch.get_default_dtype()
        with random_state_kept((each.device for each in self.parameters), seed=_SEED):
            try:
                torch.set_default_dtype(torch.float64 if self._double else usual)
                return self.raw(self.observations if observations is None else observations)
            finally:
                torch.set_default_dtype(usual)

    def kl(self, new: Any) -> Tensor:
        """Return the mean KL of the policy as it was and another one."""
        if self._kl is not None:
            stated: Tensor = self._kl(self.old, new)
            return stated
        if self._closed_form:
            return mean_kl(self.old, new)
        logs = self.joint_log_prob(new)
        change, weights = logs - self.old_joint_log_prob, self._weights
        excess = torch.where(weights > 0, torch.expm1(change) - change, 0.0)
        return (weights * excess).sum() / weights.sum() * self._actions_per_row

    @functools.cached_property
    def _closed_form(self) -> bool:
        """Whether ``mean_kl`` knows the policy's families."""
        try:
            mean_kl(self.old, self.dist())
        except NoClosedFormError:
            return False
        except TrustRegionError:
            return True  # for the checks to find
        return True

    @functools.cached_property
    def old(self) -> Any:
        """The distribution at the parameters as they are."""
        return frozen(self.dist())

    @functools.cached_property
    def actions(self) -> Any:
        """One action for each observation."""
        if self._given is not None:
            return self._given
        return mapped(torch.clone, sample(self.old))  # a transform would remember its own

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

    @functools.cached_property
    def _averaged(self) -> list[Reference]:
        """What averages are taken over: the sampler's own where few of the others count."""
        return [
            each if each.serves else sampled_reference(leaf, self.draws)
            for leaf, each in zip(leaves(self.old), self.references, strict=True)
        ]

    def joint_log_prob(self, dist: Any) -> Tensor:
        """Return the log-probability of the reference actions, (draws, rows)."""
        logs = [rows_of(leaf, each.actions) for leaf, each in self._parts(dist)]
        return sum(logs[1:], logs[0])

    @functools.cached_property
    def old_joint_log_prob(self) -> Tensor:
        """The same at the parameters as they are."""
        with torch.no_grad():
            return self.joint_log_prob(self.old)

    def mean(self, values: Tensor) -> tuple[float, float]:
        """Average over the policy's actions, given at the reference actions.

        Args:
            values: Shape (draws, rows).

        Returns:
            The mean over observations, and its standard error.
        """
        found, noise = average(values, self._weights)
        return found * self._actions_per_row, noise * self._actions_per_row

    @property
    def _weights(self) -> Tensor:
        """The reference actions', (draws, rows)."""
        factors = [each.weights for each in self._averaged]
        return math.prod(factors[1:], start=factors[0])

    @property
    def _actions_per_row(self) -> float:
        return self.old_joint_log_prob.shape[1] / self.rows

    def _parts(self, dist: Any) -> Iterator[tuple[Any, Reference]]:
        return zip(leaves(dist), self._averaged, strict=True)

    @functools.cached_property
    def vector(self) -> ParameterVector:
        """The parameters that the policy's log-probabilities depend on."""
        return ParameterVector(self.reached)

    @functools.cached_property
    def reached(self) -> tuple[Tensor, ...]:
        """The parameters that autograd reaches from the log-probabilities or the KL."""
        dist = self.dist()
        kl = self.kl(dist)
        value = log_prob(dist, self.actions).sum() + (kl if kl.isfinite() else kl * 0)
        if not value.requires_grad:
            return ()
        slopes = torch.autograd.grad(value, self.parameters, allow_unused=True)
        pairs = zip(self.parameters, slopes, strict=True)
        return tuple(parameter for parameter, slope in pairs if slope is not None)

    @contextmanager
    def at(self, step: Tensor) -> Iterator[None]:
        """Move the parameters by a step, (n,), and put them back."""
        origin = self.vector.current()
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
            pair = -(ratio * self.advantages).mean(), self.kl(dist)
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
        weights = torch.randn(self.old_log_prob.shape, generator=generator).to(self.old_log_prob)
        value = (log_prob(self.dist(), self.actions) * weights).mean()
        slopes = torch.autograd.grad(value, self.vector.parameters, allow_unused=True)
        gradient = self.vector.gather(slopes)
        # Noise by the measure of each parameter's own slope: what moves the policy little by its
        # slope would have to move so far that nothing is quadratic any more.
        pieces = [
            float(slope.norm())
            * torch.randn(slope.shape, generator=generator).to(slope)
            / max(1.0, slope.numel() ** 0.5)
            for slope in self.vector.scatter(gradient)
        ]
        step: Tensor = gradient + self.vector.gather(pieces)
        step /= step.norm().clamp_min(1e-300)
        small = 1e-6 if step.dtype is torch.float64 else 1e-3
        with torch.no_grad(), self.at(small * step):
            change = self.joint_log_prob(self.dist()) - self.old_joint_log_prob
        bend = self.mean(change.square())[0] / small**2
        return step * math.sqrt(2 * kl / bend) if bend > 0 else step


def _doubled(value: Tensor) -> Tensor:
    return value.double() if value.is_floating_point() else value


def module_of(policy: Any) -> nn.Module | None:
    """Return the module that a policy is, or is a method of."""
    owner = getattr(policy, "__self__", policy)
    return owner if isinstance(owner, nn.Module) else None
