"""The policy under test: evaluated always from the same state, and moved along its parameters."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from trpo_optim.algorithm.direction import differences_of
from trpo_optim.closure.closures import Closures
from trpo_optim.closure.parameters import ParameterVector
from trpo_optim.closure.transaction import Transaction
from trpo_optim.curvature.batch import Batch
from trpo_optim.curvature.engine_choice import learned
from trpo_optim.curvature.local_model import LocalModel
from trpo_optim.distributions import mean_kl
from trpo_optim.errors import NoClosedFormError, TrustRegionError
from trpo_optim.testing.averages import average, counting
from trpo_optim.testing.clamps import at_bounds
from trpo_optim.testing.evaluated import Evaluated, every_row, per_row
from trpo_optim.testing.observations import changed
from trpo_optim.testing.reference import Reference, reference, rows_of, sampled_reference

__all__ = ["Subject"]


class Subject(Evaluated):
    """A policy with its observations, its KL and the averages over its actions.

    Attributes:
        precise: The same in a higher precision, once that has been tried.
    """

    precise: Subject | None = None

    def widened(
        self, policy: Callable[[Any], Any], parameters: Iterable[Tensor], dtype: torch.dtype
    ) -> Subject:
        """Return another policy at the same observations, all in one precision."""

        def wide(value: Tensor) -> Tensor:
            return value.to(dtype) if value.is_floating_point() else value

        seen, actions = (changed(wide, each) for each in (self.observations, self._given))
        return Subject(policy, seen, parameters, self._kl, actions, self.draws, dtype=dtype)

    def kl(self, new: Any) -> Tensor:
        """Return the mean KL of the policy as it was and another one."""
        if self._kl is not None:
            stated: Tensor = self._kl(self.old, new)
            return stated.mean()  # closures may return that of every row, too
        if self._closed_form:
            return mean_kl(per_row(self.old), per_row(new), every_row(new))
        logs, weights = self._resolved(new)
        change = torch.where(weights > 0, logs - self.old_joint_log_prob, 0.0)
        return (weights * (torch.expm1(change) - change)).sum() / weights.sum()

    def _resolved(self, new: Any) -> tuple[Tensor, Tensor]:
        """Return the log-probabilities of the reference actions, and their weights.

        An action that hardly any draw is may lie where another policy's density rounds to zero. It
        is left out, from the gradient too.
        """
        logs, weights = self.joint_log_prob(new), self._weights
        counted = counting(logs.detach(), weights)
        if bool((counted == weights).all()):
            return logs, weights
        kept = [replace(each, weights=each.weights * (counted > 0)) for each in self._averaged]
        pairs = zip(self.joint_leaves(new), kept, strict=True)
        again = [rows_of(leaf, each.actions) for leaf, each in pairs]
        return sum(again[1:], again[0]), counted

    @functools.cached_property
    def _closed_form(self) -> bool:
        """Whether ``mean_kl`` knows the policy's families."""
        try:
            new = self.dist()
            mean_kl(per_row(self.old), per_row(new), every_row(new))
        except NoClosedFormError:
            return False
        except TrustRegionError:
            return True  # for the checks to find
        return True

    @functools.cached_property
    def advantages(self) -> Tensor:
        """Noise of mean zero, one per row."""
        noise = torch.randn(self.old_log_prob.shape, device="cpu").to(self.old_log_prob)
        return (noise - noise.mean()) / noise.std()

    @functools.cached_property
    def references(self) -> list[Reference]:
        """Reference actions of every part of the policy."""
        return [reference(leaf, self.draws) for leaf in self.joint_leaves(self.old)]

    @property
    def lost(self) -> float:
        """The share of sampled actions that have no finite log-probability."""
        return max(each.lost for each in self.references)

    @functools.cached_property
    def _averaged(self) -> list[Reference]:
        """What averages are taken over: the sampler's own where few of the others count."""
        return [
            each if each.serves else sampled_reference(leaf, self.draws)
            for leaf, each in zip(self.joint_leaves(self.old), self.references, strict=True)
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
        return average(values, self._weights)

    @property
    def _weights(self) -> Tensor:
        """The reference actions', (draws, rows)."""
        factors = [each.weights for each in self._averaged]
        return math.prod(factors[1:], start=factors[0])

    def _parts(self, dist: Any) -> Iterator[tuple[Any, Reference]]:
        return zip(self.joint_leaves(dist), self._averaged, strict=True)

    @functools.cached_property
    def vector(self) -> ParameterVector:
        """The parameters that the policy's log-probabilities depend on."""
        return ParameterVector(self.reached)

    def gradient(self, value: Tensor) -> Tensor:
        """Return the gradient of a scalar in the parameters, (n,)."""
        slopes = torch.autograd.grad(value, self.vector.parameters, allow_unused=True)
        return self.vector.gather(slopes)

    @functools.cached_property
    def reached(self) -> tuple[Tensor, ...]:
        """The parameters that autograd reaches from the log-probabilities or the KL."""
        dist = self.dist()
        kl = self.kl(dist)
        value = self.log_prob(dist).sum() + (kl if kl.isfinite() else kl * 0)
        if not value.requires_grad:
            return ()
        slopes = torch.autograd.grad(value, self.parameters, allow_unused=True)
        pairs = zip(self.parameters, slopes, strict=True)
        return tuple(parameter for parameter, slope in pairs if slope is not None)

    @functools.cached_property
    def at_bound(self) -> Tensor:
        """Which numbers of the vector lie at the bound of a clamp, where the policy has a kink."""
        root = self.log_prob(self.dist()).grad_fn
        return at_bounds([root], self.vector, self.vector.parameters)

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
            ratio = (self.log_prob(dist) - self.old_log_prob).exp()
            pair = -(ratio * self.advantages).mean(), self.kl(dist)
            return (*pair, dist) if third else pair

        return values

    @contextmanager
    def model(self, *, third: bool) -> Iterator[LocalModel]:
        """Yield gradient and Fisher-vector products, as the optimizer takes them."""
        closures = Closures([self.closure(third=third)])
        with Transaction(self.vector) as transaction, torch.no_grad():
            transaction.hold(closures.every)
            transaction.begin()
            batch = Batch(closures, self.vector, transaction, learned({}))
            model = batch.second_order()
            if model.engine == "finite differences":
                differences = differences_of(batch, transaction, model)

                def product(direction: Tensor) -> Tensor:
                    image = differences.product(direction)
                    transaction.move(direction, 0.0)
                    return image

                model = replace(model, product=product)
            yield model

    @functools.cached_property
    def refusal(self) -> str:
        """Why the closure has no Fisher-vector products, or empty."""
        try:
            for third in (True, False):
                with self.model(third=third) as model:
                    model.product(model.gradient)
        except TrustRegionError as error:
            return str(error)
        return ""
