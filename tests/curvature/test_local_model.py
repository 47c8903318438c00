"""Gradient and Fisher-vector products against dense float64 oracles, by either engine."""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from networks import Checkpointed, Scale, Scaled, ScaleWithSetup
from problems import PROBLEMS, CategoricalPolicy, GaussianPolicy, Problem, Snapshot, gaussian
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.distributions import Independent, Normal

from trpo_optim import TrustRegionError
from trpo_optim.closure.evaluation import Objective
from trpo_optim.closure.parameters import ParameterVector
from trpo_optim.closure.transaction import Transaction
from trpo_optim.curvature.autograd_graph import have_second_derivatives
from trpo_optim.curvature.engine_choice import EngineChoice
from trpo_optim.curvature.local_model import NO_THIRD_VALUE, LocalModel, second_order


def double_backward(objective: Objective) -> LocalModel:
    return second_order(objective, EngineChoice(refusal="not wanted"))


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
        objective = Objective(problem.closure, vector, transaction)
        yield engine(objective), objective


def dense(model: LocalModel) -> Tensor:
    return torch.stack([model.product(row) for row in torch.eye(len(model.gradient)).double()])


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
    "checkpoint": "saved tensor hooks",
    "buffers that move": "in-place operation",
}


@pytest.mark.parametrize("name", MIDDLES)
def test_double_backward_is_exact_whatever_the_layer(name: str) -> None:
    problem = with_middle(MIDDLES[name]())
    with linearized(problem, double_backward) as (model, _):
        assert model.engine == "double backward"
        torch.testing.assert_close(dense(model), problem.dense_fisher(), rtol=0, atol=1e-10)


@pytest.mark.parametrize("name", MIDDLES)
def test_torch_func_is_exact_or_leaves_it_to_double_backward_with_the_reason(name: str) -> None:
    problem = with_middle(MIDDLES[name]())
    with linearized(problem, torch_func) as (model, _):
        refusal = REFUSED_BY_TORCH_FUNC.get(name)
        assert model.engine == ("torch.func" if refusal is None else "double backward")
        assert NO_THIRD_VALUE in model.fallback
        assert (refusal or "") in model.fallback
        torch.testing.assert_close(dense(model), problem.dense_fisher(), rtol=0, atol=1e-10)


def draws(problem: Problem) -> None:
    problem.policy = CategoricalPolicy(
        nn.Sequential(nn.Dropout(0.1), problem.policy.get_submodule("network"))
    )


def hooks(problem: Problem) -> None:
    problem.parameters()[0].register_hook(lambda grad: 2 * grad)


def hides(problem: Problem) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch.jit announces its end
        traced = torch.jit.trace(problem.policy.get_submodule("network"), problem.observations)
    problem.policy = CategoricalPolicy(traced)


@pytest.mark.parametrize(
    ("change", "reason"),
    [(draws, "random numbers"), (hooks, "ignores the hooks"), (hides, "does not reach")],
)
def test_where_torch_func_would_be_silently_wrong_double_backward_serves(
    change: Callable[[Problem], None], reason: str
) -> None:
    problem = with_middle(nn.Identity())
    change(problem)
    with linearized(problem, torch_func) as (model, _):
        assert model.engine == "double backward"
        assert reason in model.fallback


def test_what_refused_once_is_not_tried_again() -> None:
    problem = with_middle(nn.BatchNorm1d(6), dtype=torch.float32)
    optimizer = problem.optimizer()
    counts = []
    for seed in range(2):
        problem = Problem(problem.policy, problem.observations, seed)
        report = optimizer.step(problem.closure)
        assert report.engine == "double backward"
        assert "in-place operation" in report.fallback
        counts.append(report.closure_evaluations - report.backtracks)
    assert counts == [3, 2]


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


def test_engines_take_one_step() -> None:
    vectors = []
    for engine in ("Gauss-Newton", "torch.func", "double backward"):
        problem = gaussian()
        optimizer = problem.optimizer()
        if engine == "double backward":
            problem.parameters()[0].register_hook(lambda grad: grad)  # torch.func ignores hooks
        closure = problem.closure_with_dist if engine == "Gauss-Newton" else problem.closure
        assert optimizer.step(closure).engine == engine
        vectors.append(problem.vector())
    for vector in vectors[1:]:
        torch.testing.assert_close(vector, vectors[0], rtol=1e-12, atol=1e-14)


def called(closure: Callable[[], Any]) -> Any:
    return closure()


def test_a_third_value_is_learned_of_by_one_further_evaluation_and_only_once() -> None:
    """Where the code of the closure does not show it."""
    problem = gaussian()
    optimizer = problem.optimizer()
    for evaluations in (3, 2):
        problem = Problem(problem.policy, problem.observations, evaluations)
        report = optimizer.step(functools.partial(called, problem.closure_with_dist))
        assert report.engine == "Gauss-Newton"
        assert report.closure_evaluations - report.backtracks == evaluations


def test_a_closure_whose_code_misleads_is_served_all_the_same() -> None:
    problem = gaussian()
    third = False

    def closure() -> Any:
        loss, kl = problem.closure()
        if third:
            return loss, kl, None
        return loss, kl

    optimizer = problem.optimizer()
    report = optimizer.step(closure)
    assert (report.engine, report.closure_evaluations - report.backtracks) == ("torch.func", 3)


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


@pytest.mark.parametrize("style", [Scale, ScaleWithSetup])
def test_a_function_that_forbids_second_derivatives_is_not_taken_for_zero_curvature(
    style: type[Scale],
) -> None:
    class Once(style):  # type: ignore[valid-type, misc]  # a base per parameter
        @staticmethod
        @once_differentiable
        def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor]:
            return Scale.backward(ctx, *grads)

    problem = with_middle(Scaled(Once, 6))
    with pytest.raises(TrustRegionError, match="once_differentiable"):
        problem.optimizer().step(problem.closure)


def test_an_error_where_both_engines_refuse_names_both() -> None:
    problem = with_middle(Checkpointed(reentrant=False, width=6))  # refused by torch.func

    def closure() -> tuple[Tensor, Tensor]:
        loss, kl = problem.closure()
        weight = problem.parameters()[0]
        return loss + torch.igamma(weight.exp(), torch.ones_like(weight)).mean(), kl

    with pytest.raises(TrustRegionError, match=r"torch\.func: .*saved tensor hooks") as caught:
        problem.optimizer().step(closure)
    assert "double backward: the derivative for 'igamma: input' is not" in str(caught.value)


def test_the_closures_own_runtime_error_is_not_taken_for_a_refusal() -> None:
    problem = gaussian()
    calls = []

    def closure() -> tuple[Tensor, Tensor]:
        calls.append(1)
        if len(calls) == 1:
            raise RuntimeError("a reader of the batch failed")
        return problem.closure()

    with pytest.raises(RuntimeError, match="a reader of the batch failed"):
        problem.optimizer().step(closure)
    assert len(calls) == 1


def test_a_mistake_in_the_closure_comes_out_as_torch_words_it() -> None:
    problem = gaussian()

    def closure() -> tuple[Tensor, Tensor]:
        problem.observations @ problem.observations
        return problem.closure()

    with pytest.raises(RuntimeError, match="cannot be multiplied") as caught:
        problem.optimizer().step(closure)
    assert type(caught.value) is RuntimeError


def test_numpy_inside_the_closure_comes_out_as_torch_words_it() -> None:
    problem = gaussian()

    def closure() -> tuple[Tensor, Tensor]:
        problem.policy(problem.observations).base_dist.loc.numpy()
        return problem.closure()

    with pytest.raises(RuntimeError, match="numpy") as caught:
        problem.optimizer().step(closure)
    assert type(caught.value) is RuntimeError
