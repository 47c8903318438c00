"""One policy and one batch, and the updates of every library on them."""

from __future__ import annotations

import copy
from dataclasses import dataclass, field
from typing import Any

import torch
from peers import Peer, PeerBatch
from real_batches import Pool
from timing import Job
from torch import Tensor, nn
from torch.distributions import Distribution, Independent, Normal, kl_divergence

from trpo_optim import TrustRegionOptimizer
from trpo_optim.closure.evaluation import Closure, Objective
from trpo_optim.closure.parameters import ParameterVector
from trpo_optim.closure.transaction import Transaction
from trpo_optim.curvature.second_order import second_order
from trpo_optim.hyperparameters import EngineName

OBSERVATIONS, ACTIONS = 17, 6  # HalfCheetah's
RADIUS, DAMPING, ITERATIONS = 0.01, 0.1, 10


class Policy(nn.Module):
    """A Gaussian MLP of two hidden tanh layers."""

    def __init__(self, hidden: int) -> None:
        super().__init__()
        self.network = nn.Sequential(
            nn.Linear(OBSERVATIONS, hidden),
            nn.Tanh(),
            nn.Linear(hidden, hidden),
            nn.Tanh(),
            nn.Linear(hidden, ACTIONS),
        )
        self.log_std = nn.Parameter(torch.zeros(ACTIONS))

    def forward(self, observation: Tensor) -> Distribution:
        """Return the distribution over actions."""
        return Independent(Normal(self.network(observation), self.log_std.exp()), 1)


@dataclass
class Scene:
    """A policy, a batch, and the jobs on them.

    The batch is the first rows of a real policy's, or without one Gaussian noise.
    """

    hidden: int
    samples: int
    device: str = "cpu"
    iterations: int = ITERATIONS
    pool: Pool | None = None
    policy: nn.Module = field(init=False)

    def __post_init__(self) -> None:
        """Take or draw the batch."""
        torch.manual_seed(0)
        if self.pool is None:
            self.policy = Policy(self.hidden)
            observations = torch.randn(self.samples, OBSERVATIONS)
            actions = self.policy(observations).sample()
            advantages = torch.randn(self.samples) + actions[:, 0]
        else:
            self.policy = copy.deepcopy(self.pool.policy)
            rows = (self.pool.observations, self.pool.actions, self.pool.advantages)
            observations, actions, advantages = (
                each.flatten(0, 1)[: self.samples] for each in rows
            )
        self.policy.to(self.device)
        self.observations = observations.to(self.device)
        self.actions = actions.to(self.device)
        self.advantages = ((advantages - advantages.mean()) / advantages.std()).to(self.device)
        with torch.no_grad():
            self.old_log_prob = self.policy(self.observations).log_prob(self.actions)
        self.parameters = list(self.policy.parameters())
        self._start = [parameter.detach().clone() for parameter in self.parameters]

    def closure(self, rows: slice = slice(None), *, third: bool) -> Closure:
        """Return the closure on some of the samples."""
        observations, actions = self.observations[rows], self.actions[rows]
        with torch.no_grad():
            old = self.policy(observations)

        def closure() -> Any:
            dist = self.policy(observations)
            ratio = (dist.log_prob(actions) - self.old_log_prob[rows]).exp()
            pair = -(ratio * self.advantages[rows]).mean(), kl_divergence(old, dist).mean()
            return (*pair, dist) if third else pair

        return closure

    def reset(self) -> None:
        """Put the starting weights back, in place."""
        torch._foreach_copy_([parameter.detach() for parameter in self.parameters], self._start)

    def gradient(self, micro_batches: int = 1) -> Job:
        """Evaluate the closure and differentiate its loss: the unit of costs, if in one piece."""
        closures = [self.closure(rows, third=True) for rows in self._parts(micro_batches)]

        def differentiate() -> None:
            for closure in closures:
                torch.autograd.grad(closure()[0], self.parameters)

        return Job(differentiate, self.reset)

    def update(self, **how: Any) -> Job:
        """Take one step, as ``update_and_optimizer`` takes it."""
        return self.update_and_optimizer(**how)[0]

    def update_and_optimizer(
        self,
        *,
        third: bool,
        share: float = 1.0,
        micro_batches: int = 1,
        defaults: bool = False,
        engine: EngineName = "auto",
    ) -> tuple[Job, TrustRegionOptimizer]:
        """Return a job that takes one step, and the optimizer, whose report says what was gained.

        ``share`` of the batch gives the curvature.
        """
        solver: dict[str, Any] = {} if defaults else {"damping": DAMPING, "cg_tolerance": 0.0}
        optimizer = TrustRegionOptimizer(
            self.parameters,
            max_kl=RADIUS,
            cg_iterations=self.iterations,
            engine=engine,
            **solver,
        )
        closures = [self.closure(rows, third=third) for rows in self._parts(micro_batches)]
        part = None
        if share < 1:
            part = self.closure(slice(0, int(share * self.samples)), third=third)
        whole = closures if micro_batches > 1 else closures[0]
        return Job(lambda: optimizer.step(whole, curvature=part), self.reset), optimizer

    def _parts(self, micro_batches: int) -> list[slice]:
        size = self.samples // micro_batches
        return [slice(size * index, size * (index + 1)) for index in range(micro_batches)]

    def checks(self) -> dict[str, Job]:
        """Evaluate the closure with a graph, as a step's first evaluation and as its others."""
        vector = ParameterVector(self.parameters)
        objective = Objective(self.closure(third=True), vector, Transaction(vector))
        return {
            "checked": Job(objective.with_graph),
            "unchecked": Job(objective.with_graph_elsewhere),
        }

    def product(self, *, third: bool) -> Job:
        """Multiply one vector by the Fisher matrix; a reset would end its graph."""
        vector = ParameterVector(self.parameters)
        closure = self.closure(third=third)
        model = second_order(Objective(closure, vector, Transaction(vector)))
        return Job(lambda: model.product(model.gradient))

    def peer(self, kind: type[Peer], *, defaults: bool = False) -> Job:
        """Take one step by another library, from the same point on the same batch."""
        batch = PeerBatch(self.observations, self.actions, self.advantages, self.old_log_prob)
        peer = kind(
            self.policy,
            batch,
            max_kl=RADIUS,
            damping=None if defaults else DAMPING,
            cg_iterations=None if defaults else self.iterations,
        )
        return Job(peer.update, peer.reset)
