"""Hooks change neither the loss nor the KL, and so no step."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from linearized import with_middle
from problems import gaussian
from torch import Tensor, nn


def hook(parameter: nn.Parameter) -> Any:
    return parameter.register_hook(lambda grad: grad.clamp(-1e-3, 1e-3))


def doubled(_module: nn.Module, grads: Any, _outputs: Any) -> Any:
    return (2 * grads[0],)


class Hooked(nn.Module):
    """A layer with a hook on what flows through it, or on the node behind it."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind = kind
        if kind == "module":
            self.register_full_backward_hook(doubled)

    def forward(self, x: Tensor) -> Tensor:
        y = 1 * x
        if self.kind == "tensor" and y.requires_grad:
            y.register_hook(lambda grad: 2 * grad)
        if self.kind == "node" and y.grad_fn is not None:
            y.grad_fn.register_prehook(lambda grads: (2 * grads[0],))
        return y


@pytest.mark.filterwarnings("ignore:Some parameters have hooks")
@pytest.mark.parametrize("mode", ["trpo", "natural", "vanilla"])
@pytest.mark.parametrize("third", [False, True])
@pytest.mark.parametrize("kind", ["parameter", "accumulated", "tensor", "node", "module"])
def test_hooks_change_no_step(kind: str, third: bool, mode: str) -> None:
    plain, hooked = with_middle(nn.Identity()), with_middle(Hooked(kind))
    called: list[Tensor] = []
    for parameter in hooked.parameters():
        if kind == "parameter":
            hook(parameter)
        if kind == "accumulated":
            parameter.register_post_accumulate_grad_hook(called.append)
    for problem in (plain, hooked):
        closure = problem.closure_with_dist if third else problem.closure
        assert problem.optimizer(mode=mode, lr=1e-2).step(closure).accepted
    torch.testing.assert_close(hooked.vector(), plain.vector(), rtol=1e-12, atol=1e-14)
    assert not called
    hooked.closure()[0].backward()
    if kind == "parameter":
        assert all(float(each.grad.abs().max()) <= 1e-3 for each in hooked.parameters())  # type: ignore[union-attr]  # after backward
    assert bool(called) is (kind == "accumulated")


def test_hooks_that_are_not_called_are_said() -> None:
    problem = gaussian()
    problem.parameters()[0].register_hook(lambda grad: grad)
    with pytest.warns(UserWarning, match="does not call them.*multiply it by a mask"):
        problem.optimizer().step(problem.closure)
