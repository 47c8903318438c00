"""Gradient and Fisher-vector products against dense float64 oracles, by either engine."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from linearized import (
    ENGINES,
    MIDDLES,
    dense,
    hides,
    linearized,
    with_middle,
)
from problems import PROBLEMS, GaussianPolicy, Problem, Snapshot, gaussian
from torch import Tensor, nn
from torch.distributions import Independent, Normal

from trpo_optim.closure.evaluation import Objective
from trpo_optim.closure.parameters import ParameterVector
from trpo_optim.closure.transaction import Transaction
from trpo_optim.curvature.autograd_graph import have_second_derivatives
from trpo_optim.curvature.local_model import LocalModel


@pytest.mark.parametrize("make", PROBLEMS)
@pytest.mark.parametrize("engine", ENGINES)
def test_products_equal_the_dense_hessian_of_the_kl(
    make: Callable[[], Problem], engine: Callable[[Objective], LocalModel]
) -> None:
    problem = make()
    with linearized(problem, engine) as (model, _):
        torch.testing.assert_close(dense(model), problem.dense_fisher(), rtol=0, atol=1e-10)
        torch.testing.assert_close(model.gradient, problem.dense_gradient(), rtol=0, atol=1e-10)


@pytest.mark.parametrize("make", PROBLEMS)
def test_products_equal_central_differences_of_the_kl_gradient(
    make: Callable[[], Problem],
) -> None:
    problem = make()
    direction = torch.randn(len(problem.vector()), dtype=torch.float64)
    width = 1e-5

    def kl_gradient(shift: float) -> Tensor:
        point = problem.vector() + shift * direction
        gradient: Tensor = torch.autograd.functional.jacobian(problem._of_vector(1), point)
        return gradient

    difference = (kl_gradient(width) - kl_gradient(-width)) / (2 * width)
    with linearized(problem) as (model, _):
        torch.testing.assert_close(model.product(direction), difference, rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("engine", ENGINES)
def test_the_closure_is_evaluated_once_however_many_products(
    engine: Callable[[Objective], LocalModel],
) -> None:
    with linearized(gaussian(), engine) as (model, objective):
        before = objective.evaluations
        for _ in range(5):
            model.product(model.gradient)
        assert objective.evaluations == before == 1


@pytest.mark.parametrize("middle", MIDDLES.values(), ids=MIDDLES)
@pytest.mark.parametrize("mode", ["trpo", "vanilla"])
def test_a_step_moves_parameters_and_nothing_else(
    middle: Callable[[], nn.Module], mode: str
) -> None:
    problem = with_middle(middle(), dtype=torch.float32)
    before = Snapshot.of(problem.policy)
    report = problem.optimizer(mode=mode).step(problem.closure)
    assert report.accepted
    changed = before.differences(Snapshot.of(problem.policy))
    assert changed
    assert set(changed) <= {name for name, _ in problem.policy.named_parameters()}


class AcrossRows(nn.Dropout):
    """Dropout on a transposed tensor, for which torch.func draws another mask than plain torch."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.t()).t()


@pytest.mark.parametrize("dropout", [nn.Dropout, AcrossRows])
def test_dropout_keeps_one_mask_for_every_evaluation_of_a_step(dropout: type[nn.Dropout]) -> None:
    problem = with_middle(dropout(0.5))
    masks = []
    problem.policy.get_submodule("network.1").register_forward_hook(
        lambda _module, _input, output: masks.append(output.detach() == 0)
    )
    report = problem.optimizer().step(problem.closure)
    assert report.accepted
    assert len(masks) == report.closure_evaluations > 2
    _, *counted = masks  # the first evaluation is torch.func's, which is refused
    assert all(torch.equal(mask, counted[0]) for mask in counted)
    with torch.no_grad():
        assert problem.closure()[1].item() == report.kl


@pytest.mark.usefixtures("compiler")
@pytest.mark.parametrize("mode", ["trpo", "natural", "vanilla"])
def test_a_compiled_policy_takes_the_step_of_a_plain_one(mode: str) -> None:
    plain, compiled = with_middle(nn.LayerNorm(6)), with_middle(nn.LayerNorm(6))
    compiled.policy.compile(backend="aot_eager")
    expected = plain.optimizer(mode=mode).step(plain.closure)
    report = compiled.optimizer(mode=mode).step(compiled.closure)
    assert report.outcome is expected.outcome
    torch.testing.assert_close(compiled.vector(), plain.vector(), rtol=1e-10, atol=1e-12)


@pytest.mark.usefixtures("compiler")
@pytest.mark.parametrize("engine", ENGINES)
def test_products_of_a_compiled_policy_are_exact(
    engine: Callable[[Objective], LocalModel],
) -> None:
    problem = with_middle(nn.Identity())
    oracle = problem.dense_fisher()
    problem.policy.compile(backend="aot_eager")
    with linearized(problem, engine) as (model, _):
        torch.testing.assert_close(dense(model), oracle, rtol=0, atol=1e-10)


@pytest.mark.usefixtures("compiler")
def test_a_compiled_graph_is_not_taken_for_one_with_second_derivatives() -> None:
    layer = nn.Linear(2, 2)
    compiled: Any = torch.compile(layer, backend="aot_eager")
    output = compiled(torch.ones(2)).square().sum()
    (gradient,) = torch.autograd.grad(output, layer.weight, create_graph=True)
    assert not have_second_derivatives([gradient])
    weight = torch.ones(2, requires_grad=True)
    (gradient,) = torch.autograd.grad(weight.pow(3).sum(), weight, create_graph=True)
    assert have_second_derivatives([gradient, None])


def test_a_traced_policy_that_hides_its_parameters_is_not_missed_in_silence() -> None:
    problem = with_middle(nn.Identity())
    oracle = problem.dense_fisher()
    hides(problem)
    with linearized(problem) as (model, _):
        torch.testing.assert_close(dense(model), oracle, rtol=0, atol=1e-10)


def test_parameters_captured_outside_their_module_are_reached() -> None:
    problem = gaussian()
    weight = nn.Parameter(torch.full((2,), 0.1, dtype=torch.float64))
    policy = problem.policy
    assert isinstance(policy, GaussianPolicy)

    def closure() -> tuple[Tensor, Tensor]:
        mean: Tensor = policy.network(problem.observations) + weight - 0.1
        return problem.values(Independent(Normal(mean, policy.log_std.exp()), 1))

    vector = ParameterVector([weight])
    products = []
    for engine in ENGINES:
        with Transaction(vector) as transaction:
            model = engine(Objective(closure, vector, transaction))
            products.append(model.product(torch.ones(2, dtype=torch.float64)))
    scale = policy.log_std.exp().square()  # F of a mean is 1/sigma^2
    for product in products:
        torch.testing.assert_close(product, (1 / scale).detach(), rtol=1e-12, atol=0)


def test_tied_parameters_are_one_parameter() -> None:
    problem = with_middle(nn.Linear(6, 6))
    network = problem.policy.network
    assert isinstance(network, nn.Sequential)
    inner = network[1]
    network[2] = nn.Sequential(nn.Tanh(), inner, nn.Tanh())
    problem = Problem(problem.policy, problem.observations)
    with linearized(problem) as (model, _):
        torch.testing.assert_close(dense(model), problem.dense_fisher(), rtol=0, atol=1e-10)


@pytest.mark.parametrize("make", PROBLEMS)
def test_the_operator_is_symmetric_and_positive_semi_definite(make: Callable[[], Problem]) -> None:
    with linearized(make()) as (model, _):
        matrix = dense(model)
    torch.testing.assert_close(matrix, matrix.T, rtol=0, atol=1e-14)
    assert torch.linalg.eigvalsh(matrix).min() > -1e-12
