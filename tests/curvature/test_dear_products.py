"""Where exact products are dear, finite differences serve: micro-batches, recurrence and others."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from micro_batches import on_rows
from problems import CategoricalPolicy, Problem, categorical, gaussian
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from trpo_optim import TrustRegionError, TrustRegionOptimizer, frozen, log_prob, mean_kl
from trpo_optim.curvature.engine_choice import learned

HOOKS_ARE_SHOWN = hasattr(torch._C._autograd, "_top_saved_tensors_default_hooks")
QUARTERS = [slice(16 * index, 16 * index + 16) for index in range(4)]


class Recurrent(nn.Module):
    """A recurrence over four steps of one number each."""

    def __init__(self, kind: Callable[..., nn.Module]) -> None:
        super().__init__()
        self.cell = kind(1, 6, batch_first=True)
        self.head = nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.head(self.cell(x[:, :, None])[0][:, -1])
        return result


class Convolved(nn.Module):
    """A convolution along the observation."""

    def __init__(self, activation: Callable[[Tensor], Tensor] = torch.tanh) -> None:
        super().__init__()
        self.convolution, self.head = nn.Conv1d(1, 4, 2), nn.Linear(12, 3)
        self.activation = activation

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.activation(self.convolution(x[:, None]))
        result: Tensor = self.head(hidden.flatten(1))
        return result


class Attending(nn.Module):
    """Attention over the observation's numbers, by torch's module or written out."""

    def __init__(self, *, written: bool) -> None:
        super().__init__()
        self.lift, self.head = nn.Linear(1, 8), nn.Linear(8, 3)
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)
        self.written = written

    def forward(self, x: Tensor) -> Tensor:
        seen = self.lift(x[:, :, None])
        if self.written:
            mixed = (seen @ seen.transpose(1, 2)).softmax(-1) @ seen
        else:
            mixed = self.attention(seen, seen, seen, need_weights=False)[0]
        result: Tensor = self.head(mixed.mean(1))
        return result


class Checkpointed(nn.Module):
    """Layers that are computed anew in the backward pass."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Sequential(nn.Linear(4, 6), nn.Tanh())
        self.head = nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.head(checkpoint(self.inner, x, use_reentrant=False))
        return result


DEAR: dict[str, tuple[Callable[[], nn.Module], str]] = {
    "LSTM": (lambda: Recurrent(nn.LSTM), "recurrence"),
    "GRU": (lambda: Recurrent(nn.GRU), "recurrence"),
    "RNN": (lambda: Recurrent(nn.RNN), "recurrence"),
    "convolution": (Convolved, "convolutions"),
    "attention": (lambda: Attending(written=False), "attention"),
    "attention, written out": (lambda: Attending(written=True), "attention"),
}


def dear(make: Callable[[], nn.Module], dtype: torch.dtype = torch.float32) -> Problem:
    torch.manual_seed(0)
    return Problem(CategoricalPolicy(make().to(dtype)), torch.randn(60, 4, dtype=dtype))


@pytest.mark.parametrize("third", [False, True])
@pytest.mark.parametrize("name", DEAR)
def test_dear_layers_take_finite_differences_from_the_first_step_on(name: str, third: bool) -> None:
    make, words = DEAR[name]
    problem, exact = dear(make), dear(make)
    optimizer = problem.optimizer()
    counts = []
    for step in range(3):
        report = optimizer.step(problem.closure_with_dist if third else problem.closure)
        assert (report.accepted, report.engine) == (True, "finite differences")
        assert report.fallback.endswith(f"for {words}")
        counts.append(report.closure_evaluations - report.backtracks - report.fisher_products)
        if step == 0:
            expected = exact.optimizer(engine="double backward").step(exact.closure)
            gain = report.improvement / report.kl**0.5
            assert gain == pytest.approx(expected.improvement / expected.kl**0.5, rel=0.02)
        problem = Problem(problem.policy, problem.observations, step + 1)
    assert counts[0] > 3  # to compare
    assert counts[1] <= 12  # local model, displacement, trial; a comparison after a doubt
    assert learned(optimizer.param_groups[0])["parts"]["one_sided"] is True


@pytest.mark.skipif(not HOOKS_ARE_SHOWN, reason="torch does not show hooks")
def test_checkpoints_take_finite_differences() -> None:
    problem = dear(Checkpointed)
    report = problem.optimizer().step(problem.closure_with_dist)
    assert (report.accepted, report.engine) == (True, "finite differences")
    assert "checkpoints" in report.fallback


@pytest.mark.parametrize("make", [gaussian, categorical])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_micro_batches_take_the_gain_of_the_whole_batch(
    make: Callable[..., Problem], dtype: torch.dtype
) -> None:
    whole, parts = make(dtype=dtype), make(dtype=dtype)
    expected = whole.optimizer().step(whole.closure_with_dist)
    report = parts.optimizer().step([on_rows(parts, chunk, third=True) for chunk in QUARTERS])
    assert (report.engine, expected.engine) == ("finite differences", "Gauss-Newton")
    assert report.fallback.endswith("for micro-batches")
    gain = report.improvement / report.kl**0.5
    assert gain == pytest.approx(expected.improvement / expected.kl**0.5, rel=0.005)


def test_micro_batches_beside_a_curvature_closure_keep_their_exact_products() -> None:
    problem = gaussian()
    closures = [on_rows(problem, chunk, third=True) for chunk in QUARTERS]
    report = problem.optimizer().step(closures, curvature=on_rows(problem, QUARTERS[0], third=True))
    assert report.engine == "Gauss-Newton"


def test_an_optimizer_that_went_by_whole_batches_compares_before_its_first_micro_batches() -> None:
    problem = gaussian()
    optimizer = problem.optimizer()
    assert optimizer.step(problem.closure_with_dist).engine == "Gauss-Newton"
    for _ in range(2):
        problem = Problem(problem.policy, problem.observations, 1)
        closures = [on_rows(problem, chunk, third=True) for chunk in QUARTERS]
        assert optimizer.step(closures).engine == "finite differences"
    problem = Problem(problem.policy, problem.observations, 2)
    assert optimizer.step(problem.closure_with_dist).engine == "Gauss-Newton"


def under_autocast(problem: Problem, rows: slice) -> Callable[[], Any]:
    """Return the closure on some rows, its network in half precision and its KL in single."""

    def dist() -> Any:
        with torch.autocast("cpu", torch.bfloat16):
            return problem.policy(problem.observations[rows])

    with torch.no_grad():
        old = frozen(dist())
        old_log_prob = log_prob(old, problem.actions[rows])

    def closure() -> Any:
        new = dist()
        ratio = (log_prob(new, problem.actions[rows]) - old_log_prob).exp()
        return -(ratio * problem.advantages[rows]).mean(), mean_kl(old, new), new

    return closure


def test_micro_batches_under_autocast_keep_their_exact_products() -> None:
    problem = categorical(dtype=torch.float32)
    optimizer = problem.optimizer()
    counts = []
    for _ in range(2):
        closures = [under_autocast(problem, chunk) for chunk in QUARTERS]
        report = optimizer.step(closures)
        assert report.engine == "Gauss-Newton"
        counts.append(report.closure_evaluations)
    assert counts[1] <= counts[0]
    assert learned(optimizer.param_groups[0])["parts"]["smooth"] is False


def straight_through(x: Tensor) -> Tensor:
    """Return the sign, with the slope of the identity."""
    return x + (x.sign() - x).detach()


def test_layers_without_the_slope_of_their_values_keep_their_exact_products() -> None:
    problem = dear(lambda: Convolved(straight_through))
    report = problem.optimizer().step(problem.closure_with_dist)
    assert report.engine == "Gauss-Newton"


def kinked(size: float) -> Callable[[Tensor], Tensor]:
    """Return a function with a kink at every multiple of a small number."""
    return lambda x: x + size * (x / size - (x / size).round()).abs()


def test_a_policy_that_becomes_uneven_returns_to_exact_products() -> None:
    problem = dear(Convolved)
    layer: Any = problem.policy.network
    optimizer = problem.optimizer()
    assert optimizer.step(problem.closure_with_dist).engine == "finite differences"
    layer.activation = kinked(1e-5)
    problem = Problem(problem.policy, problem.observations, 1)
    report = optimizer.step(problem.closure_with_dist)
    assert report.engine == "Gauss-Newton"


def test_hooks_in_the_closure_change_no_finite_difference() -> None:
    vectors = []
    for hooked in (False, True):
        problem = gaussian()

        def closure(problem: Problem = problem, hooked: bool = hooked) -> Any:
            dist = problem.policy(problem.observations)
            if hooked and torch.is_grad_enabled():
                dist.base_dist.loc.register_hook(torch.zeros_like)
            return *problem.values(dist), dist

        problem.optimizer(engine="finite differences").step(closure)
        vectors.append(problem.vector())
    assert torch.equal(*vectors)


def test_a_mistake_in_a_later_evaluation_is_an_error_and_moves_nothing() -> None:
    problem = gaussian()
    before, calls = problem.vector(), 0

    def closure() -> Any:
        nonlocal calls
        calls += 1
        values = problem.closure()
        return values if calls != 5 else (values[0].item(), values[1])

    with pytest.raises(TrustRegionError, match=r"loss is a float, not a tensor"):
        problem.optimizer(engine="finite differences").step(closure)
    assert torch.equal(problem.vector(), before)


@pytest.mark.usefixtures("compiler")
def test_a_compiled_policy_runs_compiled_in_finite_differences() -> None:
    compiled: list[bool] = []

    def backend(module: torch.fx.GraphModule, _inputs: Any) -> Callable[..., Any]:
        def run(*inputs: Any) -> Any:
            compiled.append(torch.is_grad_enabled())
            return module.forward(*inputs)

        return run

    problem = gaussian(dtype=torch.float32)
    twin = gaussian(dtype=torch.float32)
    problem.policy.compile(backend=backend)
    reports = [
        each.optimizer(engine="finite differences").step(each.closure) for each in (problem, twin)
    ]
    assert all(report.accepted for report in reports)
    assert compiled.count(True) == reports[0].closure_evaluations - reports[0].backtracks - 2
    assert compiled.count(False) == reports[0].backtracks + 1
    torch.testing.assert_close(problem.vector(), twin.vector(), rtol=0, atol=1e-5)


def test_a_closure_that_is_not_dear_returns_to_exact_products() -> None:
    problem, cheap = dear(Convolved), dear(lambda: nn.Linear(4, 3))
    optimizer = TrustRegionOptimizer(
        [*problem.policy.parameters(), *cheap.policy.parameters()], max_kl=0.01
    )
    assert optimizer.step(problem.closure_with_dist).engine == "finite differences"
    report = optimizer.step(cheap.closure_with_dist)
    assert (report.accepted, report.engine, report.fallback) == (True, "Gauss-Newton", "")
