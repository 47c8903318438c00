"""The hyperparameter ``engine``: what makes products, by name."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from linearized import with_middle
from micro_batches import UNEVEN, lengths, on_rows
from once_differentiable import Layer, Opaque
from problems import PROBLEMS, Problem, gaussian
from torch import nn

from trpo_optim import TrustRegionError, TrustRegionOptimizer
from trpo_optim.curvature.engine_choice import learned

EXACT = ["Gauss-Newton", "torch.func", "double backward"]


@pytest.mark.parametrize("mode", ["trpo", "natural"])
@pytest.mark.parametrize("make", PROBLEMS)
def test_every_engine_takes_the_same_step(make: Any, mode: str) -> None:
    vectors = []
    for engine in [*EXACT, "finite differences"]:
        problem = make()
        report = problem.optimizer(mode=mode, engine=engine).step(problem.closure_with_dist)
        assert (report.accepted, report.engine) == (True, engine)
        assert report.fallback == f"engine is {engine!r}"
        vectors.append(problem.vector())
    for vector, tolerance in zip(vectors[1:], (1e-10, 1e-10, 1e-5), strict=True):
        torch.testing.assert_close(vector, vectors[0], rtol=0, atol=tolerance)


@pytest.mark.parametrize("engine", EXACT)
def test_a_named_engine_serves_micro_batches_and_a_curvature_closure(engine: str) -> None:
    whole, parts, part = (gaussian() for _ in range(3))
    closures = [on_rows(parts, chunk, third=True) for chunk in UNEVEN]
    whole.optimizer(engine=engine).step(on_rows(whole, slice(0, 64), third=True))
    reports = [
        parts.optimizer(engine=engine).step(closures, weights=lengths(UNEVEN)),
        part.optimizer(engine=engine).step(
            on_rows(part, slice(0, 64)), curvature=on_rows(part, slice(0, 64), third=True)
        ),
    ]
    for report, problem in zip(reports, (parts, part), strict=True):
        assert report.engine == engine
        torch.testing.assert_close(problem.vector(), whole.vector(), rtol=0, atol=1e-10)


def test_the_engine_can_be_changed_between_steps_and_is_saved() -> None:
    problem = gaussian()
    optimizer = problem.optimizer(engine="finite differences")
    assert optimizer.step(problem.closure_with_dist).engine == "finite differences"
    resumed = problem.optimizer()
    resumed.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    problem = Problem(problem.policy, problem.observations, 1)
    assert resumed.step(problem.closure_with_dist).engine == "finite differences"
    for engine in [*EXACT, "auto"]:
        resumed.param_groups[0]["engine"] = engine
        problem = Problem(problem.policy, problem.observations, 1)
        found = resumed.step(problem.closure_with_dist).engine
        assert found == ("Gauss-Newton" if engine == "auto" else engine)


def test_an_unknown_engine_is_refused_with_the_names() -> None:
    with pytest.raises(TrustRegionError, match=r"engine is 'exact'; it must be 'auto', 'Gauss-"):
        gaussian().optimizer(engine="exact")


class Unsupported(torch.autograd.Function):
    """Without ``setup_context``, which torch.func wants."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
        return 1 * x

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        return grads[0]


@pytest.mark.parametrize(
    ("engine", "layer", "third", "reason"),
    [
        ("Gauss-Newton", nn.Identity(), False, "it returns no third value"),
        ("torch.func", Layer(Unsupported.apply), True, "setup_context"),
        ("Gauss-Newton", Layer(Opaque.apply), True, "differs from the finite difference"),
        ("double backward", Layer(Opaque.apply), False, "differs from the finite difference"),
    ],
)
def test_a_named_engine_that_does_not_serve_is_an_error_that_says_why(
    engine: str, layer: nn.Module, third: bool, reason: str
) -> None:
    problem = with_middle(layer)
    before = problem.vector()
    with pytest.raises(TrustRegionError, match=rf"engine is '{engine}', .*{reason}.*'auto'"):
        problem.optimizer(engine=engine).step(
            problem.closure_with_dist if third else problem.closure
        )
    assert torch.equal(problem.vector(), before)


@pytest.mark.parametrize("first", ["auto", "finite differences"])
def test_an_engine_named_later_is_compared_all_the_same(first: str) -> None:
    problem = with_middle(Layer(Opaque.apply))
    optimizer = problem.optimizer(engine=first)
    assert optimizer.step(problem.closure).engine == "finite differences"
    problem = Problem(problem.policy, problem.observations, 1)
    optimizer.param_groups[0]["engine"] = "double backward"
    with pytest.raises(TrustRegionError, match=r"differs from the finite difference"):
        optimizer.step(problem.closure)


def test_finite_differences_by_name_in_half_precision_are_an_error_that_says_what_to_set() -> None:
    problem = gaussian(dtype=torch.bfloat16)
    with pytest.raises(TrustRegionError, match=r"half precision.* set engine='auto'"):
        problem.optimizer(engine="finite differences", max_kl=0.5).step(problem.closure)


def test_vanilla_policy_gradient_needs_no_engine() -> None:
    problem = gaussian()
    optimizer = problem.optimizer(mode="vanilla", lr=1e-3, engine="Gauss-Newton")
    assert optimizer.step(problem.closure).engine == "autograd"


def test_what_an_older_version_learned_is_completed() -> None:
    problem = gaussian()
    optimizer = problem.optimizer()
    state = optimizer.state_dict()
    group = state["param_groups"][0]
    del group["engine"]
    group["engines"] = {
        "parts": {"third": True, "refusal": "", "flaw": "", "proven": True, "doubts": 0}
    }
    optimizer.load_state_dict(state)
    parts = [on_rows(problem, chunk, third=True) for chunk in UNEVEN]
    report = optimizer.step(parts, weights=lengths(UNEVEN))
    assert report.engine == "finite differences"
    assert learned(optimizer.param_groups[0])["parts"]["smooth"] is True
    assert isinstance(optimizer, TrustRegionOptimizer)
