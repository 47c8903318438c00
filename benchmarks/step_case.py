"""One policy with the batch that a step is taken on, and the held-out one that it is judged on."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple

import torch
from real_batches import Pool
from scene import RADIUS, Scene
from scipy.optimize import brentq
from timing import Job
from torch import Tensor

from trpo_optim.closure.evaluation import Closure
from trpo_optim.closure.parameters import ParameterVector

Product = Callable[[Tensor], Tensor]


class Gains(NamedTuple):
    """What a direction gains at the radius: the fall of the surrogate loss."""

    own: float
    held_out: float


class Case:
    """A policy, the rollouts that a step is taken on, and those that the step is judged on."""

    def __init__(self, pool: Pool, own: Sequence[int], held_out: Sequence[int]) -> None:
        self.own = pool.scene(own)
        model = self.own.model()
        self.product = model.product
        self.uphill = -model.gradient / model.gradient.norm()
        self._origin = ParameterVector(self.own.parameters).current()
        scenes = [self.own, pool.scene(held_out)]
        moved = copy.deepcopy(pool.policy)  # the products' graphs need the own policy as it is
        self._moved = ParameterVector(moved.parameters())
        self._judges = [
            Scene(moved, each.observations, each.actions, each.advantages).closure()
            for each in scenes
        ]
        self._start = [self._at(torch.zeros_like(self._origin), each)[0] for each in self._judges]

    def taken(self, job: Job, parameters: Iterable[Tensor]) -> Tensor:
        """Return the step that a job takes on parameters that are those of this policy."""
        job.run()
        return ParameterVector(parameters).current() - self._origin

    def first_kl(self, direction: Tensor, product: Product) -> float:
        """Return the KL, over the radius, of the length that the quadratic model gives a step."""
        return self._kl(_length(direction, product) * direction) / RADIUS

    def gains(self, direction: Tensor) -> Gains:
        """Return the gains at the length with which the KL on the own batch is the radius."""
        direction = direction.float()
        high = _length(direction, self.product)
        while self._kl(high * direction) < RADIUS:
            high *= 2
        scale = brentq(lambda t: self._kl(t * direction) - RADIUS, 0.0, high, rtol=1e-4)
        own, held_out = (
            start - self._at(scale * direction, judge)[0]
            for start, judge in zip(self._start, self._judges, strict=True)
        )
        return Gains(own, held_out)

    def _kl(self, step: Tensor) -> float:
        return self._at(step, self._judges[0])[1]

    @torch.no_grad()
    def _at(self, step: Tensor, judge: Closure) -> tuple[float, float]:
        self._moved.write(self._moved.scatter(self._origin + step))
        loss, kl, *_ = judge()
        return loss.item(), kl.item()


def _length(direction: Tensor, product: Product) -> float:
    return math.sqrt(2 * RADIUS / float(direction.dot(product(direction))))
