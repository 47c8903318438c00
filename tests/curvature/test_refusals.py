"""Closures that torch.func takes without an error and would get wrong: double backward serves."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from linearized import dense, double_backward, linearized, torch_func, with_middle
from once_differentiable import Layer
from problems import CategoricalPolicy, Problem, gaussian
from torch import Tensor, nn
from torch._C._functorch import _grad_increment_nesting

from trpo_optim.torch_private import is_transformed, transforms_undone


def seeded_by_fork(x: Tensor) -> Tensor:
    with torch.random.fork_rng():
        torch.manual_seed(5)
        return nn.functional.dropout(x.t(), 0.3).t()


def seeded_as_before(x: Tensor) -> Tensor:
    torch.manual_seed(5)
    dropped = nn.functional.dropout(x.t(), 0.3).t()
    torch.manual_seed(5)
    return dropped


def caught(x: Tensor) -> Tensor:
    try:
        scale = (1 * x).detach().requires_grad_().detach().mean()
    except RuntimeError:
        scale = torch.zeros(())
    return x * (1 + scale)


OUTSIDE = torch.randn(40, 6, dtype=torch.float64, requires_grad=True)


def forced(x: Tensor) -> Tensor:
    """Add a force, with respect to positions from outside."""
    energy = (OUTSIDE * x).tanh().square().sum()
    (force,) = torch.autograd.grad(
        energy, OUTSIDE, create_graph=torch.is_grad_enabled(), materialize_grads=True
    )
    return x + 0.3 * force


@pytest.mark.parametrize(
    ("function", "reason"),
    [
        (seeded_by_fork, "draws random numbers"),
        (seeded_as_before, "draws random numbers"),
        (caught, "requires_grad_"),
    ],
)
def test_the_step_is_that_of_double_backward_and_the_reason_is_told(
    function: Callable[[Tensor], Tensor], reason: str
) -> None:
    with linearized(with_middle(Layer(function)), torch_func) as (model, _):
        products, gradient = dense(model), model.gradient
        assert model.engine == "double backward"
        assert reason in model.fallback
    with linearized(with_middle(Layer(function)), double_backward) as (model, _):
        torch.testing.assert_close(products, dense(model), rtol=0, atol=0)
        torch.testing.assert_close(gradient, model.gradient, rtol=0, atol=0)


def test_a_gradient_in_a_tensor_from_outside_is_not_lost() -> None:
    """Inside the closure; a trial needs gradients, too, which the policy switches on."""

    def switched(x: Tensor) -> Tensor:
        with torch.enable_grad():
            return forced(x) if x.requires_grad else forced(x).detach()

    with linearized(with_middle(Layer(switched)), torch_func) as (model, _):
        assert model.engine == "double backward"
        assert "from outside" in model.fallback
        products = dense(model)
    with linearized(with_middle(Layer(switched)), double_backward) as (model, _):
        torch.testing.assert_close(products, dense(model), rtol=0, atol=0)


def test_dropout_that_is_switched_off_is_no_reason() -> None:
    problem = with_middle(nn.Dropout(0.5).eval())
    with linearized(problem, torch_func) as (model, _):
        assert model.engine == "torch.func"


def test_an_interrupt_that_leaves_a_transform_open_is_cleaned_up() -> None:
    def interrupted() -> None:
        with transforms_undone():
            _grad_increment_nesting()
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert not is_transformed(torch.ones(1) + 1)
    problem = gaussian()
    assert problem.optimizer().step(problem.closure).engine == "torch.func"


class Lazy(nn.Module):
    """Makes a mask when it first needs one, and copies it ever after."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 3).double()
        self.mask: Tensor | None = None

    def forward(self, x: Tensor) -> Tensor:
        if self.mask is None:
            self.mask = torch.ones(4, dtype=torch.float64) + 0 * x.sum()
        result: Tensor = self.layer(x * copy.deepcopy(self.mask.detach()))
        return result


def test_a_trial_can_copy_what_the_first_evaluation_kept() -> None:
    policy = Lazy()
    problem = Problem(CategoricalPolicy(policy), torch.randn(20, 4, dtype=torch.float64))
    policy.mask = None
    calls: list[Any] = []

    def closure() -> Any:
        values = problem.closure()
        calls.append(policy.mask is not None and is_transformed(policy.mask))
        return values

    assert problem.optimizer().step(closure).accepted
    assert not any(calls[1:])
