"""What belongs to the policy is put back, however it is written; what a closure logs stays."""

from __future__ import annotations

import random
from collections import deque
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from problems import CategoricalPolicy, Problem, gaussian
from torch import Tensor, nn

from trpo_optim import StepReport, TrustRegionError, TrustRegionOptimizer

LIBRARY = torch.library.Library("trpo_optim_tests_state", "DEF")
LIBRARY.define("tally(Tensor(a!) x) -> ()")
LIBRARY.impl("tally", lambda x: x.add_(1).sum().item() and None, "CPU")


class Stateful(nn.Module):
    """A layer that keeps statistics in every way, and writes them in one of them."""

    tallied: Tensor
    bound: Tensor
    sparse: Tensor

    def __init__(self, write: Callable[[Stateful, Tensor], object]) -> None:
        super().__init__()
        self.write = write
        self.register_buffer("tallied", torch.zeros(2))
        self.register_buffer("bound", torch.zeros(2))
        self.register_buffer("sparse", torch.eye(2).to_sparse())
        self.plain = torch.zeros(2)
        self.count = 0
        self.named: dict[str, Any] = {"mean": torch.zeros(2), "nested": [torch.zeros(2)]}
        self.recent = deque([torch.zeros(2)], maxlen=3)
        self.frozen = nn.Parameter(torch.zeros(2), requires_grad=False)
        self.expanded = torch.zeros(1).expand(2)
        self.generator = torch.Generator().manual_seed(3)
        self.others: list[Any] = [
            np.random.default_rng(3),
            np.random.RandomState(3),
            random.Random(3),
        ]
        self.helper = Helper()

    def forward(self, x: Tensor) -> Tensor:
        self.write(self, x)
        return x

    def state(self) -> list[Any]:
        """Return all that a step must leave alone."""
        return [
            self.tallied.tolist(),
            self.bound.tolist(),
            self.sparse.to_dense().tolist(),
            self.plain.tolist(),
            self.count,
            self.named["mean"].tolist(),
            self.named["nested"][0].tolist(),
            self.recent[0].tolist(),
            self.frozen.tolist(),
            self.expanded.tolist(),
            self.generator.get_state().tolist(),
            self.others[0].bit_generator.state,
            *map(str, (self.others[1].get_state(), self.others[2].getstate())),
            self.helper.mean.tolist(),
            self.training,
        ]


class Helper:
    """No module."""

    def __init__(self) -> None:
        self.mean = torch.zeros(2)


def rebound(layer: Stateful, x: Tensor) -> None:
    layer.plain = 0.9 * layer.plain + x.detach().mean()
    layer.count += len(x)


def counted_buffer(layer: Stateful, x: Tensor) -> None:
    layer.tallied.add_(1)
    layer.count += len(x)


def counted_and_replaced_buffer(layer: Stateful, x: Tensor) -> None:
    layer.bound = layer.bound + x.detach().mean()
    layer.count += len(x)


def rebound_item(layer: Stateful, x: Tensor) -> None:
    layer.named["mean"] = layer.named["mean"] + x.detach().mean()


def only_without_gradients(layer: Stateful, x: Tensor) -> None:
    if not torch.is_grad_enabled():
        layer.tallied += len(x)
        layer.plain += 1


def drawing(layer: Stateful, x: Tensor) -> None:
    layer.plain.copy_(torch.rand(2, generator=layer.generator))
    for each in layer.others:
        each.random()


def into_numpy(layer: Stateful, x: Tensor) -> None:
    layer.tallied.numpy()[0] += 1


def resized(layer: Stateful, x: Tensor) -> None:
    layer.plain.set_(torch.ones(3).untyped_storage(), 0, (3,), (1,))


WRITES: dict[str, Callable[[Stateful, Tensor], object]] = {
    "in place": lambda layer, x: layer.tallied.add_(1),
    "through .data": lambda layer, x: layer.tallied.data.add_(1),
    "by an operator of a library": lambda layer, x: torch.ops.trpo_optim_tests_state.tally(
        layer.tallied
    ),
    "many at once": lambda layer, x: torch._foreach_add_([layer.tallied, layer.bound], 1),
    "through NumPy": into_numpy,
    "a buffer replaced": lambda layer, x: setattr(layer, "bound", layer.bound + 1),
    "a buffer replaced in its dict": lambda layer, x: layer._buffers.update(bound=torch.ones(2)),
    "a sparse buffer": lambda layer, x: layer.sparse.mul_(2),
    "the values of a sparse buffer": lambda layer, x: layer.sparse.values().add_(1),
    "new elements of a sparse buffer": lambda layer, x: layer.sparse.copy_(
        torch.ones(2, 2).to_sparse()
    ),
    "an attribute": lambda layer, x: layer.plain.add_(1),
    "an attribute and its count": rebound,
    "a buffer and its count": counted_buffer,
    "a buffer replaced and its count": counted_and_replaced_buffer,
    "an attribute of other memory": resized,
    "an attribute resized": lambda layer, x: layer.plain.resize_(5).fill_(1),
    "an item": rebound_item,
    "an item, in place": lambda layer, x: layer.named["nested"][0].add_(1),
    "an item of a deque": lambda layer, x: layer.recent[0].add_(1),
    "a frozen parameter": lambda layer, x: layer.frozen.add_(1),
    "one element that stands for two": lambda layer, x: layer.expanded[:1].add_(1),
    "a helper's tensor": lambda layer, x: setattr(layer.helper, "mean", layer.helper.mean + 1),
    "a generator": drawing,
    "the mode": lambda layer, x: layer.eval(),
    "only without gradients": only_without_gradients,
}


def stateful(name: str) -> tuple[Problem, Stateful]:
    torch.manual_seed(0)
    layer = Stateful(lambda *_: None)
    network = nn.Sequential(nn.Linear(2, 3), layer, nn.Linear(3, 2))
    problem = Problem(CategoricalPolicy(network), torch.randn(6, 2))
    layer.write = WRITES[name]
    return problem, layer


@pytest.mark.parametrize("mode", ["trpo", "vanilla"])
@pytest.mark.parametrize("rejected", [False, True])
@pytest.mark.parametrize("third", [False, True])
@pytest.mark.parametrize("name", WRITES)
def test_the_policys_state_is_put_back_after_every_evaluation(
    name: str, third: bool, rejected: bool, mode: str
) -> None:
    problem, layer = stateful(name)
    before = layer.state()
    seen = []

    def closure() -> Any:
        seen.append(layer.state())
        loss, kl, dist = problem.closure_with_dist()
        if rejected and not torch.is_grad_enabled():
            kl = kl * torch.nan
        return (loss, kl, dist) if third else (loss, kl)

    report = problem.optimizer(mode=mode).step(closure)
    assert report.accepted is not rejected
    assert 1 < len(seen) <= report.closure_evaluations  # of an old torch, torch.func cannot look
    assert [*seen, layer.state()] == [before] * (len(seen) + 1)


@pytest.mark.filterwarnings("ignore:torch.ao.quantization is deprecated", "ignore:.*reduce_range")
def test_quantisation_aware_training_leaves_its_observers_where_they_were() -> None:
    from torch.ao import quantization

    torch.manual_seed(0)
    network = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 3))
    network.qconfig = quantization.get_default_qat_qconfig("fbgemm")
    quantization.prepare_qat(network.train(), inplace=True)
    network(torch.randn(64, 4))  # which gives the observers their shapes
    problem = Problem(CategoricalPolicy(network), torch.randn(64, 4))
    before = {name: each.clone() for name, each in network.named_buffers()}
    report = problem.optimizer().step(problem.closure_with_dist)
    assert isinstance(report, StepReport)
    assert len(before) > 10
    for name, each in network.named_buffers():
        assert torch.equal(each, before[name]), name


class Normaliser(nn.Module):
    """Statistics of the observations, outside of the policy."""

    mean: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(4, dtype=torch.float64))

    def forward(self, x: Tensor) -> Tensor:
        self.mean += 0.1 * (x.mean(0) - self.mean)
        return x - self.mean


def test_a_module_outside_of_the_policy_is_put_back_if_it_runs() -> None:
    problem, normaliser = gaussian(), Normaliser()
    observations = problem.observations
    with torch.no_grad():
        problem = Problem(problem.policy, normaliser(observations))
    normaliser.mean.zero_()
    seen = []

    def closure() -> Any:
        seen.append(normaliser.mean.tolist())
        return problem.values(problem.policy(normaliser(observations)))

    assert problem.optimizer().step(closure).accepted
    assert [*seen, normaliser.mean.tolist()] == [[0.0] * 4] * (len(seen) + 1)


def test_what_a_closure_logs_stays() -> None:
    problem = gaussian()
    kls = torch.zeros(50, dtype=torch.float64)
    calls: list[float] = []
    total = torch.zeros((), dtype=torch.float64)

    class Metric(nn.Module):
        """As a metric of torchmetrics that is updated by a method."""

        def __init__(self) -> None:
            super().__init__()
            self.sum, self.count = torch.zeros(()), 0

        def update(self, value: Tensor) -> None:
            self.sum += value.detach().abs().float() + 1
            self.count += 1

    metric = Metric()

    def closure() -> Any:
        loss, kl = problem.closure()
        kls[len(calls)] = 1
        calls.append(1.0)
        total.add_(1)
        metric.update(torch.ones(()))
        return loss, kl

    problem.refused = "a metric's own tensors may not be written within torch.func"
    report = problem.optimizer().step(closure)
    count = report.closure_evaluations
    assert len(calls) == count
    assert kls.sum() == total == metric.count == count
    assert metric.sum == 2 * count


def test_a_large_frozen_parameter_that_is_written_is_named() -> None:
    problem = gaussian()
    problem.policy.register_parameter(
        "table", nn.Parameter(torch.zeros(2**19), requires_grad=False)
    )

    def closure() -> Any:
        problem.policy.get_parameter("table")[0] += 1
        return problem.closure()

    before = problem.vector()
    optimizer = TrustRegionOptimizer([each for each in problem.parameters() if each.requires_grad])
    with pytest.raises(TrustRegionError, match=r"writes GaussianPolicy\.table, .* \(524288,\)"):
        optimizer.step(closure)
    assert torch.equal(problem.vector()[: len(before)][-2:], before[-2:])
