"""A policy that draws masks and writes its buffers in every way there is."""

from __future__ import annotations

import torch
from devices import manual_seed
from problems import CategoricalPolicy, Problem, give_gradients
from torch import Tensor, nn

from trpo_optim import StepReport


class Statistics(nn.Module):
    """Writes one buffer in every way there is, and replaces another."""

    written: Tensor
    replaced: Tensor

    def __init__(self) -> None:
        super().__init__()
        for name in ("written", "replaced"):
            self.register_buffer(name, torch.zeros(3))

    def forward(self, x: Tensor) -> Tensor:
        self.written += 1
        self.written.mul_(2)
        self.written[0] = 5
        self.written[:2].add_(3)
        self.written.data.mul_(0.9)
        torch.add(self.written, 1, out=self.written)
        self.replaced = self.replaced + 1
        return x


def small_problem() -> Problem:
    manual_seed(0)
    network = nn.Sequential(nn.Linear(2, 3), Statistics(), nn.Dropout(0.2), nn.Linear(3, 2))
    problem = Problem(CategoricalPolicy(network), torch.randn(6, 2))
    give_gradients(problem.policy)
    return problem


def take_a_step(
    problem: Problem, *, rejected: bool = False, mode: str = "trpo", first: bool = False
) -> StepReport:
    """Take a step as a further one of an optimizer, or as its first one."""

    def closure() -> tuple[Tensor, Tensor]:
        loss, kl = problem.closure()
        return loss, (kl if torch.is_grad_enabled() or not rejected else kl * float("nan"))

    make = problem.optimizer if first else problem.proven_optimizer
    optimizer = make(mode=mode, cg_iterations=1, damping=1e-3)
    report = optimizer.step(closure)
    assert report.accepted is not rejected
    return report
