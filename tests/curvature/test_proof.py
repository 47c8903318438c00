"""When an engine is proven, when it is doubted, and what no product can be proven for."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from linearized import with_middle
from micro_batches import on_rows
from once_differentiable import Opaque
from problems import CategoricalPolicy, Problem, gaussian
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from trpo_optim import Outcome, TrustRegionError, TrustRegionOptimizer


class Gated(nn.Module):
    """A branch whose backward leaves torch, and that is switched off at first."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(6, 6)
        self.gate = 0.0

    def forward(self, x: Tensor) -> Tensor:
        branch: Tensor = Opaque.apply(self.inner(x))  # type: ignore[no-untyped-call]  # torch's own
        return x + self.gate * branch


@pytest.mark.parametrize("on_a_part", [False, True])
def test_an_engine_whose_kl_surprises_is_proven_anew(on_a_part: bool) -> None:
    torch.manual_seed(0)
    problem = with_middle(Gated())
    gate: Any = problem.policy.get_submodule("network.1")
    optimizer = problem.optimizer()
    engines = []
    for step in range(8):  # when a KL surprises depends on the rows
        part = on_rows(problem, slice(0, 16), third=True) if on_a_part else None
        report = optimizer.step(problem.closure_with_dist, curvature=part)
        assert report.accepted
        engines.append(report.engine)
        gate.gate = 3.0
        problem = Problem(problem.policy, problem.observations, step + 1)
    assert engines[0] == "Gauss-Newton"
    assert engines[-1] == "finite differences"


def test_products_on_a_part_are_doubted_by_the_kl_of_that_part() -> None:
    """The batch's own KL may be another, whatever the products."""
    problem = gaussian()
    optimizer = problem.optimizer(max_kl=1e-4, damping=1e-2)
    apart, evaluations = [], []
    for step in range(4):
        part = on_rows(problem, slice(0, 4), third=True)
        report = optimizer.step(problem.closure_with_dist, curvature=part)
        apart.append(report.kl / report.predicted_kl)
        evaluations.append(report.closure_evaluations - report.backtracks)
        problem = Problem(problem.policy, problem.observations, step + 1)
    assert min(apart) > 2  # the solve fits the four rows
    assert evaluations[0] > 5  # to compare
    # Two local models, a trial, and the KL of the part: beyond the radius and at the end.
    assert evaluations[1:] == [5] * 3


def test_a_policy_whose_kl_always_surprises_is_proven_a_few_times_only() -> None:
    problem = gaussian()
    optimizer = problem.optimizer(max_kl=3.0)
    counts = []
    for step in range(8):
        report = optimizer.step(problem.closure_with_dist)
        counts.append(report.closure_evaluations - report.backtracks)
        problem = Problem(problem.policy, problem.observations, step + 1)
    assert counts[0] > 2
    assert counts[-3:] == [2, 2, 2]


def test_finite_differences_under_autocast_are_refused() -> None:
    class Cast(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3))

        def forward(self, x: Tensor) -> Tensor:
            seen = x.clone().requires_grad_()
            with torch.autocast("cpu", torch.bfloat16):
                out: Tensor = checkpoint(self.body, seen, use_reentrant=True)
            return out.float()

    torch.manual_seed(0)
    problem = Problem(CategoricalPolicy(Cast()), torch.randn(30, 4))
    before = problem.vector()
    with pytest.raises(TrustRegionError, match=r"computes in half precision.*without autocast"):
        problem.optimizer().step(problem.closure)
    assert torch.equal(problem.vector(), before)


@pytest.mark.parametrize("third", [False, True])
def test_a_critics_loss_is_found_beside_a_curvature_closure(third: bool) -> None:
    problem, critic = gaussian(), nn.Linear(4, 1).double()

    def closure() -> Any:
        dist = problem.policy(problem.observations)
        loss, kl = problem.values(dist)
        whole = loss + 0.5 * (critic(problem.observations) - 3).square().mean()
        return (whole, kl, dist) if third else (whole, kl)

    optimizer = TrustRegionOptimizer([*problem.parameters(), *critic.parameters()])
    with pytest.raises(TrustRegionError, match="critic with its own optimizer"):
        optimizer.step(closure, curvature=on_rows(problem, slice(0, 16), third=third))


def test_a_critics_loss_is_found_in_a_later_step() -> None:
    problem, critic = gaussian(), nn.Linear(4, 1).double()
    share = 0.0

    def closure() -> Any:
        loss, kl = problem.closure()
        return loss + share * (critic(problem.observations) - 3).square().mean(), kl

    optimizer = TrustRegionOptimizer([*problem.parameters(), *critic.parameters()])
    assert optimizer.step(closure).accepted  # as where it is multiplied by nothing
    problem = Problem(problem.policy, problem.observations, 1)
    share = 0.5
    with pytest.raises(TrustRegionError, match="critic with its own optimizer"):
        optimizer.step(closure)


def test_points_of_the_proof_lie_within_the_radius() -> None:
    """A policy that is no number elsewhere takes its step."""
    problem = gaussian()
    largest: list[float] = []

    def closure() -> Any:
        loss, kl = problem.closure()
        largest.append(float(kl))
        return (loss, kl) if kl < 2e-8 else (loss * torch.nan, kl * torch.nan)

    report = problem.optimizer(max_kl=1e-8).step(closure)
    assert report.outcome is Outcome.ACCEPTED
    assert max(largest) < 2e-8


def test_a_backward_that_calls_backward_is_driven() -> None:
    """As of a reversible network, which computes its activations anew."""

    class Reversible(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor, inner: nn.Module) -> Tensor:
            ctx.inner, ctx.x = inner, x.detach()
            with torch.no_grad():
                result: Tensor = inner(x)
            return result

        @staticmethod
        def backward(ctx: Any, *grads: Any) -> Any:
            x = ctx.x.detach().requires_grad_()
            with torch.enable_grad():
                y = ctx.inner(x)
            torch.autograd.backward(y, grads[0])
            return x.grad, None

    class Layer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = nn.Linear(6, 6)

        def forward(self, x: Tensor) -> Tensor:
            result: Tensor = Reversible.apply(x, self.inner)  # type: ignore[no-untyped-call]  # torch's own
            return result

    reports = []
    for third in (False, True):
        problem = with_middle(Layer())
        plain = with_middle(nn.Linear(6, 6))
        plain.policy.load_state_dict(
            {
                name.replace(".inner", ""): value
                for name, value in problem.policy.state_dict().items()
            }
        )
        plain = Problem(plain.policy, problem.observations)
        reports.append(
            problem.optimizer().step(problem.closure_with_dist if third else problem.closure)
        )
        plain.optimizer().step(plain.closure_with_dist if third else plain.closure)
        assert reports[-1].engine == "finite differences"
        torch.testing.assert_close(problem.vector(), plain.vector(), rtol=0, atol=1e-5)
        assert all(each.grad is None for each in problem.parameters())


@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad")
@pytest.mark.parametrize("mode", ["trpo", "vanilla"])
@pytest.mark.parametrize("third", [False, True])
def test_parameters_hidden_in_a_checkpoint_move_with_those_that_the_graph_shows(
    third: bool, mode: str
) -> None:
    class Body(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3)).double()
            self.bias = nn.Parameter(torch.zeros(3, dtype=torch.float64))
            self.hidden = False

        def forward(self, x: Tensor) -> Tensor:
            if not self.hidden:
                return self.inner(x) + self.bias  # type: ignore[no-any-return]  # a module's
            seen = x.clone().requires_grad_()
            out: Tensor = checkpoint(self.inner, seen, use_reentrant=True)
            return out + self.bias

    vectors = []
    for hidden in (False, True):
        torch.manual_seed(0)
        body = Body()
        problem = Problem(CategoricalPolicy(body), torch.randn(30, 4, dtype=torch.float64))
        body.hidden = hidden
        closure = problem.closure_with_dist if third else problem.closure
        assert problem.optimizer(mode=mode, lr=0.1).step(closure).accepted
        vectors.append(problem.vector())
    torch.testing.assert_close(vectors[0], vectors[1], rtol=0, atol=1e-5)
