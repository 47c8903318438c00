"""Finite differences in half precision, where torch cannot differentiate the closure twice."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.autograd import Function
from torch.autograd.function import once_differentiable
from torch.distributions import Categorical

from trpo_optim import Closures, TrustRegionError, TrustRegionOptimizer, frozen, mean_kl
from trpo_optim.algorithm.finite_differences import FiniteDifferences

QUARTERS = [slice(64 * index, 64 * index + 64) for index in range(4)]

BF16, F16 = torch.bfloat16, torch.float16

MATRIX = torch.diag(torch.tensor([3.0, 1.0, 0.01], dtype=torch.float64))
MATRIX[0, 1] = MATRIX[1, 0] = 0.5


def rough(vector: Tensor, length: float) -> tuple[float, Tensor]:
    """Return the slope of ½xᵀMx + ⅔Σx³, with errors like those of bfloat16 at a KL of 1e-6."""
    x = length * vector
    errors = 2e-3 * torch.tensor([1.0, 0.6, 0.06], dtype=torch.float64) * (1e9 * x.sum()).sin()
    return float(0.5 * x @ MATRIX @ x), MATRIX @ x + 2 * x.square() + errors


def test_products_are_taken_on_both_sides_and_far_enough() -> None:
    differences = FiniteDifferences(rough, torch.finfo(BF16).eps)
    for vector in [*torch.eye(3, dtype=torch.float64)[:2]] * 2:
        image = MATRIX @ vector
        assert float((differences.product(vector) - image).norm()) < 0.04 * float(image.norm())


class Once(Function):
    """Nothing, but what forbids a second backward."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        return grads[0]


class Attention(nn.Module):
    """Two layers that attend to all numbers of an observation."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.place = nn.Linear(1, 32), nn.Parameter(0.5 * torch.randn(6, 32))
        self.mix = nn.ModuleList(nn.Linear(32, 96) for _ in range(2))
        self.norm = nn.ModuleList(nn.LayerNorm(32) for _ in range(2))
        self.head = nn.Linear(32, 5)

    def forward(self, observations: Tensor) -> Tensor:
        x = self.embed(observations[..., None]) + self.place
        for mix, norm in zip(self.mix, self.norm, strict=True):
            query, key, value = mix(norm(x)).chunk(3, -1)
            x = x + (query @ key.mT / 32**0.5).softmax(-1) @ value
        result: Tensor = 2 * self.head(x.mean(1))
        return result


def perceptron() -> nn.Module:
    return nn.Sequential(
        nn.Linear(6, 64), nn.Tanh(), nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, 5)
    )


@dataclass
class Setting:
    """A policy on a batch, part of which computes in half precision.

    Attributes:
        network: From observations to logits.
        cast: The precision of autocast, or None.
        once: Whether torch may differentiate it once alone.
    """

    network: nn.Module
    cast: torch.dtype | None
    once: bool

    def __post_init__(self) -> None:
        """Draw the batch."""
        torch.manual_seed(1)
        self.observations, self.advantages = torch.randn(256, 6), torch.randn(256)
        with torch.no_grad():
            self.actions = self.dist().sample()

    def dist(self, rows: slice = slice(None)) -> Categorical:
        weight = next(self.network.parameters())
        with torch.autocast("cpu", self.cast or BF16, enabled=self.cast is not None):
            logits = self.network(self.observations[rows].to(weight.dtype))
        once: Any = Once.apply if self.once else nn.Identity()
        logits = once(logits)
        return Categorical(logits=logits if weight.dtype is torch.float64 else logits.float())

    def closure(self, rows: slice = slice(None)) -> Callable[[], Any]:
        with torch.no_grad():
            old = frozen(self.dist(rows))
        actions, advantages = self.actions[rows], self.advantages[rows]

        def closure() -> Any:
            new = self.dist(rows)
            ratio = (new.log_prob(actions) - old.log_prob(actions)).exp()
            return -(ratio * advantages).mean(), mean_kl(old, new), new

        return closure


def setting(make: Callable[[], nn.Module], kind: str, *, once: bool) -> Setting:
    torch.manual_seed(0)
    network, dtype = make(), {"bfloat16": BF16, "float16": F16}[kind.split()[-1]]
    if kind.startswith("parameters"):
        return Setting(network.to(dtype), None, once)
    return Setting(network, dtype, once)


KINDS = ["autocast to bfloat16", "autocast to float16", "parameters in bfloat16"]


def gain_at_radius(network: nn.Module, start: list[Tensor], max_kl: float) -> float:
    """Return the gain, in float64, of a step scaled to a KL."""
    exact = Setting(copy.deepcopy(network).double(), None, once=False)
    moved = [each.detach().clone() for each in exact.network.parameters()]

    @torch.no_grad()
    def put(scale: float) -> None:
        for each, old, new in zip(exact.network.parameters(), start, moved, strict=True):
            each.copy_(old.double() + scale * (new - old.double()))

    put(0.0)
    closure = exact.closure()
    before, low, high = closure()[0].item(), 0.0, 4.0
    for _ in range(25):
        middle = (low + high) / 2
        put(middle)
        low, high = (middle, high) if closure()[1].item() < max_kl else (low, middle)
    gain: float = before - closure()[0].item()
    return gain


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("make", [perceptron, Attention])
def test_a_step_without_second_derivatives_gains_what_the_exact_step_gains(
    make: Callable[[], nn.Module], kind: str
) -> None:
    gains = {}
    for once in (False, True):
        case = setting(make, kind, once=once)
        parameters = list(case.network.parameters())
        start = [each.detach().clone() for each in parameters]
        closure = case.closure()
        report = TrustRegionOptimizer(parameters).step(closure)
        assert report.accepted
        assert (report.engine == "finite differences") == once
        assert ("in half precision, finite differences are off" in report.fallback) == once
        with torch.no_grad():
            assert 0.009 < report.kl == closure()[1].item() <= 0.01
        gains[once] = gain_at_radius(case.network, start, 0.01)
    assert gains[True] > 0.96 * gains[False] > 0


def test_micro_batches_are_served_too() -> None:
    case = setting(perceptron, "autocast to bfloat16", once=True)
    optimizer = TrustRegionOptimizer(case.network.parameters())
    for _ in range(2):
        closures = Closures([case.closure(rows) for rows in QUARTERS])
        report = optimizer.step(closures)
        assert (report.accepted, report.engine) == (True, "finite differences")
        assert 0.009 < report.kl <= 0.01


def test_finite_differences_may_be_named() -> None:
    case = setting(perceptron, "autocast to bfloat16", once=False)
    optimizer = TrustRegionOptimizer(case.network.parameters(), engine="finite differences")
    report = optimizer.step(case.closure())
    assert (report.accepted, report.engine) == (True, "finite differences")


def test_a_kl_in_half_precision_is_an_error_that_says_what_to_set() -> None:
    case = setting(perceptron, "autocast to bfloat16", once=True)
    closure = case.closure()
    before = [each.detach().clone() for each in case.network.parameters()]
    optimizer = TrustRegionOptimizer(case.network.parameters(), mode="natural", max_kl=0.5)
    with pytest.raises(TrustRegionError, match=r"KL is computed in half precision.*mean_kl"):
        optimizer.step(lambda: (closure()[0], closure()[1].bfloat16()))
    assert all(map(torch.equal, before, case.network.parameters()))
