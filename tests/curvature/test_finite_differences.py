"""Products by finite differences, as an engine and as the witness of the others."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from devices import each_device
from linearized import with_middle
from networks import NETWORKS
from once_differentiable import Layer, Opaque
from problems import Problem, categorical, gaussian
from torch import Tensor, nn
from torch.distributions import Independent, Laplace, Normal

from trpo_optim import Outcome, TrustRegionError, TrustRegionOptimizer
from trpo_optim.algorithm.disagreement import disagreement
from trpo_optim.algorithm.finite_differences import FiniteDifferences

MATRIX = torch.diag(torch.tensor([3.0, 1.0, 0.01], dtype=torch.float64))
MATRIX[0, 1] = MATRIX[1, 0] = 0.5


def slope_of(cubic: float = 0.0, noise: float = 0.0) -> Callable[[Tensor, float], Any]:
    """Return the slope of ½xᵀMx + cubic · Σx³/3, with noise that depends on the place."""

    def slope(vector: Tensor, length: float) -> tuple[float, Tensor]:
        x = length * vector
        kl = float(0.5 * x @ MATRIX @ x + cubic * x.pow(3).sum() / 3)
        return kl, MATRIX @ x + cubic * x.square() + noise * (1e9 * x).sin()

    return slope


@pytest.mark.parametrize("scale", [1e-8, 1.0, 1e8])
def test_products_are_those_of_the_matrix_whatever_the_vectors_length(scale: float) -> None:
    differences = FiniteDifferences(slope_of(cubic=1.0), 2e-16)
    for vector in torch.eye(3, dtype=torch.float64):
        product = differences.product(scale * vector)
        torch.testing.assert_close(product / scale, MATRIX @ vector, rtol=0, atol=2e-4)


def test_the_first_product_is_by_central_differences() -> None:
    differences = FiniteDifferences(slope_of(cubic=1e3), 2e-16)
    vector = torch.tensor([1.0, 0.0, 0.0], dtype=torch.float64)
    torch.testing.assert_close(differences.product(vector), MATRIX @ vector, rtol=0, atol=1e-9)


def test_a_gradient_away_from_zero_is_taken_off() -> None:
    offset = torch.tensor([0.3, -0.2, 0.1], dtype=torch.float64)

    def slope(vector: Tensor, length: float) -> tuple[float, Tensor]:
        kl, gradient = slope_of()(vector, length)
        return kl, gradient + offset

    vector = torch.tensor([0.6, 0.8, 0.0], dtype=torch.float64)
    product = FiniteDifferences(slope, 2e-16).product(vector)
    torch.testing.assert_close(product, MATRIX @ vector, rtol=0, atol=1e-6)


def test_a_small_kink_along_the_first_vector_does_not_move_the_other_products() -> None:
    kink = torch.tensor([0.0, 0.0, 0.02], dtype=torch.float64)

    def slope(vector: Tensor, length: float) -> tuple[float, Tensor]:
        kl, gradient = slope_of()(vector, length)
        return kl, gradient + (length * vector[0]).abs() * kink

    differences = FiniteDifferences(slope, 2e-16)
    for vector in torch.eye(3, dtype=torch.float64):
        product = differences.product(vector)
        torch.testing.assert_close(product, MATRIX @ vector, rtol=0, atol=1e-6)


def test_a_flat_direction_has_a_product_of_zero() -> None:
    def slope(vector: Tensor, length: float) -> tuple[float, Tensor]:
        return 0.0, torch.zeros_like(vector)

    assert not FiniteDifferences(slope, 2e-16).product(torch.ones(3)).any()
    assert not FiniteDifferences(slope_of(), 2e-16).product(torch.zeros(3)).any()


def test_a_kink_is_said() -> None:
    def slope(vector: Tensor, length: float) -> tuple[float, Tensor]:
        return abs(length), abs(length) * vector.abs() + vector.abs()

    with pytest.raises(TrustRegionError, match=r"has a kink here.*mode='vanilla'"):
        FiniteDifferences(slope, 2e-16).product(torch.ones(3))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_said(dtype: torch.dtype) -> None:
    with pytest.raises(TrustRegionError, match=r"half precision.*without autocast.*vanilla"):
        FiniteDifferences(slope_of(), torch.finfo(dtype).eps)


UNIT = torch.tensor([0.6, 0.8, 0.0], dtype=torch.float64)


@pytest.mark.parametrize(
    ("change", "expected"),
    [(1.0, 0.0), (1.01, 0.0), (0.5, 0.5), (0.0, 1.0), (-1.0, 2.0)],
)
def test_a_product_that_is_off_disagrees_by_as_much(change: float, expected: float) -> None:
    found = disagreement(slope_of(), UNIT, change * (MATRIX @ UNIT), 2e-16, 1e-15).apart
    assert found == pytest.approx(expected, rel=1e-3, abs=1e-12)


def test_nothing_is_said_where_differences_are_not_to_be_trusted() -> None:
    def straight_through(vector: Tensor, length: float) -> tuple[float, Tensor]:
        kl, _ = slope_of()(vector, length)
        return kl, 2 * MATRIX @ (length * vector)

    def still(vector: Tensor, length: float) -> tuple[float, Tensor]:
        return 0.0, torch.zeros_like(vector)

    image = 0.5 * MATRIX @ UNIT
    for slope in (straight_through, still, slope_of(noise=1.0)):
        assert disagreement(slope, UNIT, image, 2e-16, 1e-15).apart == 0
    assert disagreement(slope_of(), UNIT, image, torch.finfo(torch.bfloat16).eps, 0.4).apart == 0


@pytest.mark.parametrize("third", [False, True])
@pytest.mark.parametrize("max_kl", [1e-6, 0.01])
def test_a_backward_outside_of_torch_is_found_and_takes_the_step_of_one_inside(
    max_kl: float, third: bool
) -> None:
    vectors = []
    for layer in (Layer(Opaque.apply), nn.Tanh()):
        problem = with_middle(layer)
        optimizer = problem.optimizer(max_kl=max_kl)
        for step in range(2):
            report = optimizer.step(problem.closure_with_dist if third else problem.closure)
            assert report.accepted
            if not isinstance(layer, nn.Tanh):
                assert report.engine == "finite differences"
                assert "differs from the finite difference" in report.fallback
            if max_kl < 1e-4:
                assert report.kl == pytest.approx(report.predicted_kl, rel=0.02)
            problem = Problem(problem.policy, problem.observations, step + 1)
        vectors.append(problem.vector())
    torch.testing.assert_close(vectors[0], vectors[1], rtol=0, atol=2e-3 * max_kl**0.5)


def test_a_laplace_without_a_third_value_takes_the_step_of_its_fisher_matrix() -> None:
    class Policy(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.mean = nn.Linear(4, 2).double()

        def forward(self, x: Tensor) -> Any:
            return Independent(Laplace(self.mean(x), 1.0), 1)

    vectors = []
    for third in (True, False):
        torch.manual_seed(0)
        problem = Problem(Policy(), torch.randn(60, 4, dtype=torch.float64))
        report = problem.optimizer().step(problem.closure_with_dist if third else problem.closure)
        assert report.accepted
        assert report.engine == ("Gauss-Newton" if third else "finite differences")
        vectors.append(problem.vector())
    torch.testing.assert_close(vectors[0], vectors[1], rtol=0, atol=1e-3)


def rounded(x: Tensor) -> Tensor:
    """Round to multiples of a tenth, with the slope of the identity."""
    return x + ((10 * x).round() / 10 - x).detach()


def half_seen(x: Tensor) -> Tensor:
    return x - 0.5 * x.detach()


@pytest.mark.parametrize("third", [False, True])
@pytest.mark.parametrize("function", [rounded, half_seen])
def test_gradients_that_are_not_those_of_the_values_keep_their_engine(
    function: Callable[[Tensor], Tensor], third: bool
) -> None:
    problem = with_middle(Layer(function))
    report = problem.optimizer().step(problem.closure_with_dist if third else problem.closure)
    assert report.engine == ("Gauss-Newton" if third else "torch.func")


@pytest.mark.parametrize("third", [False, True])
@pytest.mark.parametrize("make", [gaussian, categorical])
def test_a_sound_engine_is_proven_once_and_kept(make: Callable[..., Problem], third: bool) -> None:
    problem = make(dtype=torch.float32)
    optimizer = problem.optimizer()
    counts = []
    for step in range(3):
        closure = problem.closure_with_dist if third else problem.closure
        report = optimizer.step(closure)
        assert report.engine == ("Gauss-Newton" if third else "torch.func")
        counts.append(report.closure_evaluations - report.backtracks)
        problem = Problem(problem.policy, problem.observations, step + 1)
    assert counts[0] >= 2 + 3
    assert counts[1:] == [2, 2]
    saved = copy.deepcopy(optimizer.state_dict())
    resumed = problem.optimizer()
    resumed.load_state_dict(saved)
    report = resumed.step(problem.closure_with_dist if third else problem.closure)
    assert report.closure_evaluations - report.backtracks == 2


def test_micro_batches_and_a_curvature_closure_go_by_finite_differences() -> None:
    whole = with_middle(Layer(Opaque.apply))
    parts, part = copy.deepcopy(whole), copy.deepcopy(whole)

    def on(problem: Problem, rows: slice) -> Callable[[], Any]:
        def closure() -> Any:
            dist = problem.policy(problem.observations[rows])
            ratio = (dist.log_prob(problem.actions[rows]) - problem.old_log_prob[rows]).exp()
            old = torch.distributions.Categorical(logits=problem.old.logits[rows])  # type: ignore[attr-defined]  # a Categorical
            kl = torch.distributions.kl_divergence(old, dist).mean()
            return -(ratio * problem.advantages[rows]).mean(), kl

        return closure

    expected = whole.optimizer().step(whole.closure)
    report = parts.optimizer().step(
        [on(parts, slice(0, 10)), on(parts, slice(10, 40))], weights=[10, 30]
    )
    assert (report.engine, expected.engine) == ("finite differences",) * 2
    torch.testing.assert_close(parts.vector(), whole.vector(), rtol=0, atol=1e-5)
    report = part.optimizer().step(part.closure, curvature=on(part, slice(0, 40)))
    assert report.engine == "finite differences"
    torch.testing.assert_close(part.vector(), whole.vector(), rtol=0, atol=1e-5)


def test_an_odd_number_of_parameters_before_complex_ones_is_differentiated() -> None:
    class Rotation(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.scale = nn.Parameter(torch.ones(3, dtype=torch.float64))
            self.turn = nn.Parameter(torch.randn(2, 2, dtype=torch.float64))

        def forward(self, x: Tensor) -> Any:
            turned = torch.view_as_complex(self.turn) * torch.complex(x[:, :2], x[:, 2:])
            return Independent(Normal(turned.real * self.scale[:2], self.scale[2:].exp()), 1)

    for third in (False, True):
        torch.manual_seed(0)
        problem = Problem(Rotation(), torch.randn(20, 4, dtype=torch.float64))
        report = problem.optimizer().step(problem.closure_with_dist if third else problem.closure)
        assert report.accepted
        assert report.engine == ("Gauss-Newton" if third else "torch.func")


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
@each_device
@pytest.mark.parametrize("network", ["MLP", "LSTM, padded", "TransformerEncoder, eval"])
def test_directions_by_finite_differences_gain_what_exact_ones_do(
    network: str, device: str
) -> None:
    """In single precision: the improvement at equal KL, beside double backward's."""
    from families import FAMILIES
    from policy_settings import Policy, Setting

    gains = []
    for engine in ("Gauss-Newton", "finite differences"):
        torch.manual_seed(0)
        setting = Setting(Policy(NETWORKS[network]().to(device), FAMILIES["Normal"]))
        report = TrustRegionOptimizer(setting.trained, engine=engine).step(setting.closure)
        assert report.outcome is Outcome.ACCEPTED
        assert report.engine == engine
        gains.append(report.improvement / report.kl**0.5)
    assert gains[1] == pytest.approx(gains[0], rel=0.01)
