"""Parameter groups: hyperparameters live in them and must agree; what may be in one."""

from __future__ import annotations

import copy
import io
import math
import re
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR

from trpo_optim import TrustRegionError, TrustRegionOptimizer
from trpo_optim.hyperparameters import Hyperparameters

# A valid value for each hyperparameter that differs from the one in BASE or the default.
BASE: dict[str, dict[str, Any]] = {
    "max_norm": {"mode": "vanilla", "max_norm": 1.0},
    "mode": {"mode": "natural"},
}
OTHER: dict[str, Any] = {
    "mode": "trpo",
    "max_kl": 0.02,
    "constraint": "max",
    "max_norm": 2.0,
    "lr": 0.5,
    "damping": 0.2,
    "cg_iterations": 5,
    "cg_tolerance": 0.01,
    "backtrack_ratio": 0.8,
    "max_backtracks": 3,
    "improvement_ratio": 0.2,
    "maximize": True,
    "engine": "finite differences",
    "preconditioner": "diagonal",
    "preconditioner_decay": 0.5,
}


def parameter() -> nn.Parameter:
    return nn.Parameter(torch.zeros(3, dtype=torch.float64))


def build(**changes: Any) -> TrustRegionOptimizer:
    return TrustRegionOptimizer([parameter()], **changes)


def quadratic(*parameters: Tensor) -> Callable[[], tuple[Tensor, Tensor]]:
    """A closure whose KL is half the squared distance from here."""
    old = [each.detach().clone() for each in parameters]

    def closure() -> tuple[Tensor, Tensor]:
        moves = [each - start for each, start in zip(parameters, old, strict=True)]
        kl = torch.stack([0.5 * move.square().sum() for move in moves]).sum()
        return -torch.stack([each.sum() for each in parameters]).sum(), kl

    return closure


RATES = [{"mode": "vanilla"}, {"mode": "natural", "max_kl": None}]
"""Settings under which ``lr`` is the rate of the step."""


@pytest.mark.parametrize("settings", RATES, ids=str)
def test_an_lr_that_is_set_on_the_group_is_given(settings: dict[str, Any]) -> None:
    by_hand, scheduled = build(), build()
    by_hand.param_groups[0]["lr"] = 0.01
    LambdaLR(scheduled, lambda _: 0.01)
    for optimizer in (by_hand, scheduled, copy.deepcopy(scheduled)):
        optimizer.param_groups[0].update(settings)
        assert optimizer.step(quadratic(optimizer.param_groups[0]["params"][0])).accepted


@pytest.mark.parametrize("settings", RATES, ids=str)
def test_a_mode_switched_to_on_the_group_needs_an_lr_too(settings: dict[str, Any]) -> None:
    for given, raises in (({}, True), ({"lr": 1.0}, False)):
        optimizer = copy.deepcopy(build(**given))
        optimizer.param_groups[0].update(settings)
        closure = quadratic(optimizer.param_groups[0]["params"][0])
        if raises:
            with pytest.raises(TrustRegionError, match="lr was not given"):
                optimizer.step(closure)
        else:
            assert optimizer.step(closure).accepted


@pytest.mark.parametrize("settings", RATES, ids=str)
def test_a_saved_default_is_no_lr_that_was_given(settings: dict[str, Any]) -> None:
    resumed = build()
    resumed.load_state_dict(build().state_dict())
    resumed.param_groups[0].update(settings)
    with pytest.raises(TrustRegionError, match="lr was not given"):
        resumed.step(quadratic(resumed.param_groups[0]["params"][0]))
    resumed = build()
    resumed.load_state_dict(build(**settings, lr=1.0).state_dict())
    assert resumed.step(quadratic(resumed.param_groups[0]["params"][0])).accepted


@pytest.mark.parametrize(("name", "value"), [("lr", np.float64(0.5)), ("mode", np.str_("natural"))])
def test_a_numpy_value_set_on_a_group_is_plain_again_after_a_step(name: str, value: Any) -> None:
    optimizer = build()
    optimizer.param_groups[0][name] = value
    optimizer.step(quadratic(optimizer.param_groups[0]["params"][0]))
    file = io.BytesIO()
    torch.save(optimizer.state_dict(), file)
    file.seek(0)
    assert torch.load(file, weights_only=True)["param_groups"][0][name] == value


@pytest.mark.parametrize("max_kl", [0.04, 0.0025])
def test_a_radius_changed_on_the_group_holds_from_the_next_step(max_kl: float) -> None:
    weight = parameter()
    optimizer = TrustRegionOptimizer([weight])
    optimizer.param_groups[0]["max_kl"] = max_kl
    report = optimizer.step(quadratic(weight))
    assert 0.9 * max_kl <= 0.5 * float(weight.detach().square().sum()) <= max_kl
    assert report.kl == pytest.approx(0.5 * float(weight.detach().square().sum()))


@pytest.mark.parametrize(
    ("name", "value"), [("max_kl", -1.0), ("max_kl", None), ("lr", math.nan), ("mode", "ppo")]
)
def test_a_bad_value_set_on_the_group_raises_at_the_step_and_moves_nothing(
    name: str, value: Any
) -> None:
    weight = parameter()
    optimizer = TrustRegionOptimizer([weight])
    optimizer.param_groups[0][name] = value
    with pytest.raises(TrustRegionError, match=f"^{name} is {value!r}"):
        optimizer.step(quadratic(weight))
    assert torch.equal(weight, torch.zeros_like(weight))
    assert optimizer.last_report is None


@pytest.mark.parametrize("name", Hyperparameters.names())
def test_groups_that_disagree_are_refused_when_made_added_and_stepped(name: str) -> None:
    other = re.escape(f"{OTHER[name]!r} in param_groups[1]")
    disagreement = rf"^{name} is .* in param_groups\[0\] and {other}\..*the same value"
    settings = BASE.get(name, {})
    with pytest.raises(TrustRegionError, match=disagreement):
        TrustRegionOptimizer(
            [{"params": [parameter()]}, {"params": [parameter()], name: OTHER[name]}], **settings
        )

    optimizer = build(**settings)
    state = optimizer.state_dict()
    with pytest.raises(TrustRegionError, match=disagreement):
        optimizer.add_param_group({"params": [parameter()], name: OTHER[name]})
    assert optimizer.state_dict() == state

    weights = [parameter(), parameter()]
    optimizer = TrustRegionOptimizer([{"params": [each]} for each in weights], **settings)
    optimizer.param_groups[1][name] = OTHER[name]
    with pytest.raises(TrustRegionError, match=disagreement):
        optimizer.step(quadratic(*weights))
    assert all(torch.equal(weight, torch.zeros_like(weight)) for weight in weights)


def test_a_group_with_an_invalid_value_is_not_added() -> None:
    optimizer = build()
    with pytest.raises(TrustRegionError, match="max_kl is -1"):
        optimizer.add_param_group({"params": [parameter()], "max_kl": -1})
    assert len(optimizer.param_groups) == 1


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_a_group_that_fails_by_another_error_is_not_added(error: type[BaseException]) -> None:
    class Unprintable:
        def __repr__(self) -> str:
            raise error

    optimizer = build()
    state = optimizer.state_dict()
    with pytest.raises(error):
        optimizer.add_param_group({"params": [parameter()], "max_kl": Unprintable()})
    assert optimizer.state_dict() == state


def test_an_added_group_takes_part_in_the_one_radius() -> None:
    weights = [parameter(), parameter()]
    optimizer = TrustRegionOptimizer(weights[:1])
    optimizer.add_param_group({"params": weights[1:]})
    optimizer.step(quadratic(*weights))
    distances = [0.5 * float(weight.detach().square().sum()) for weight in weights]
    assert min(distances) > 0.0
    assert 0.9 * 0.01 <= sum(distances) <= 0.01


def test_groups_may_share_a_value_that_is_not_the_default() -> None:
    groups = [{"params": [parameter()], "max_kl": 0.02} for _ in range(2)]
    optimizer = TrustRegionOptimizer(groups)
    assert [group["max_kl"] for group in optimizer.param_groups] == [0.02, 0.02]


@pytest.mark.parametrize("dtype", [torch.int64, torch.complex64])
@pytest.mark.parametrize("named", [True, False])
def test_parameters_that_are_not_real_are_refused_by_name(dtype: torch.dtype, named: bool) -> None:
    policy = nn.Module()
    policy.weight = parameter()
    policy.counts = nn.Parameter(torch.zeros(2, dtype=dtype), requires_grad=False)
    name = "'counts'" if named else "1"
    with pytest.raises(TrustRegionError, match=f"Parameter {name} is {dtype}"):
        TrustRegionOptimizer(policy.named_parameters() if named else policy.parameters())


def test_a_group_with_a_parameter_that_is_not_real_is_not_added() -> None:
    optimizer = build()
    with pytest.raises(TrustRegionError, match="complex64"):
        optimizer.add_param_group({"params": [torch.zeros(2, dtype=torch.complex64)]})
    assert len(optimizer.param_groups) == 1


def test_an_empty_list_and_a_lone_tensor_are_refused_as_torch_does() -> None:
    lone: Any = parameter()
    with pytest.raises(ValueError, match="empty parameter list"):
        TrustRegionOptimizer([])
    with pytest.raises(TypeError, match="should be an iterable"):
        TrustRegionOptimizer(lone)


def test_parameters_that_are_all_frozen_are_refused_at_the_step() -> None:
    weight = parameter().requires_grad_(False)
    optimizer = TrustRegionOptimizer([weight])
    with pytest.raises(TrustRegionError, match=r"requires_grad_\(True\)"):
        optimizer.step(quadratic(weight))


def test_a_group_without_parameters_takes_part_in_no_step() -> None:
    weight = torch.zeros(2, requires_grad=True)
    groups: list[dict[str, Any]] = [{"params": []}, {"params": [weight]}]
    optimizer = TrustRegionOptimizer(groups)
    report = optimizer.step(lambda: (-weight.sum(), weight.square().sum() / 2))
    assert report.accepted


def test_a_group_that_torch_refuses_changes_nothing() -> None:
    own = parameter()
    optimizer = TrustRegionOptimizer([own])
    with pytest.raises(ValueError, match="more than one parameter group"):
        optimizer.add_param_group({"params": [own], "lr": 0.5})
    assert len(optimizer.param_groups) == 1
    optimizer.param_groups[0]["mode"] = "vanilla"
    with pytest.raises(TrustRegionError, match="lr was not given"):
        optimizer.step(quadratic(own))
