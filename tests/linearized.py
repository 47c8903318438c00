"""Local models of small problems, by either engine, and layers that an engine may refuse."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from networks import Checkpointed, Scale, Scaled, ScaleWithSetup
from problems import CategoricalPolicy, Problem
from torch import Tensor, nn

from trpo_optim.closure.evaluation import Objective
from trpo_optim.closure.parameters import ParameterVector
from trpo_optim.closure.transaction import Transaction
from trpo_optim.curvature.engine_choice import nothing_learned
from trpo_optim.curvature.local_model import LocalModel
from trpo_optim.curvature.second_order import second_order


def double_backward(objective: Objective) -> LocalModel:
    return second_order(objective, {**nothing_learned(), "refusal": "not wanted"})


def torch_func(objective: Objective) -> LocalModel:
    return second_order(objective)


ENGINES = [torch_func, double_backward]


class Counting(nn.Module):
    """A layer that writes one buffer in place and replaces another by what flows through it."""

    count: Tensor
    mean: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("count", torch.zeros(()))
        self.register_buffer("mean", torch.zeros(6))

    def forward(self, x: Tensor) -> Tensor:
        self.count += 1
        self.mean = 0.9 * self.mean + 0.1 * x.mean(0)
        return x


def with_middle(layer: nn.Module, *, dtype: torch.dtype = torch.float64) -> Problem:
    torch.manual_seed(1)
    network = nn.Sequential(nn.Linear(4, 6), layer, nn.Tanh(), nn.Linear(6, 3)).to(dtype)
    return Problem(CategoricalPolicy(network), torch.randn(40, 4, dtype=dtype))


@contextmanager
def linearized(
    problem: Problem, engine: Callable[[Objective], LocalModel] = double_backward
) -> Iterator[tuple[LocalModel, Objective]]:
    vector = ParameterVector(problem.parameters())
    with Transaction(vector) as transaction:
        transaction.begin()
        objective = Objective(problem.closure, vector, transaction)
        yield engine(objective), objective


def dense(model: LocalModel) -> Tensor:
    return torch.stack([model.product(row) for row in torch.eye(len(model.gradient)).double()])


MIDDLES: dict[str, Callable[[], nn.Module]] = {
    "identity": nn.Identity,
    "batch norm, training": lambda: nn.BatchNorm1d(6),
    "function with setup_context": lambda: Scaled(ScaleWithSetup, 6),
    "function without setup_context": lambda: Scaled(Scale, 6),
    "checkpoint": lambda: Checkpointed(reentrant=False, width=6),
    "buffers that move": Counting,
}


REFUSED_BY_TORCH_FUNC = {
    "batch norm, training": "in-place operation",
    "function without setup_context": "setup_context",
    "checkpoint": "hooks",
    "buffers that move": "in-place operation",
}


def hides(problem: Problem) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch.jit announces its end
        traced = torch.jit.trace(problem.policy.get_submodule("network"), problem.observations)
    problem.policy = CategoricalPolicy(traced)
