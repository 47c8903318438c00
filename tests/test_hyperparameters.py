"""Hyperparameters: bounds, types, messages; live in the groups, which must agree."""

from __future__ import annotations

import copy
import io
import math
import re
from collections.abc import Callable
from dataclasses import asdict
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from trpo_optim import TrustRegionError, TrustRegionOptimizer
from trpo_optim.hyperparameters import Hyperparameters

TINY = math.nextafter(0.0, 1.0)
BELOW_ONE = math.nextafter(1.0, 0.0)
NUMBERS: dict[str, tuple[str, list[float], list[float]]] = {
    # name: the limit in words, the outermost values inside it, the nearest outside
    "max_kl": ("above 0", [TINY, 1e300], [0, 0.0, -TINY]),
    "max_norm": ("above 0", [TINY, 1e300], [0, 0.0, -TINY]),
    "lr": ("at least 0", [0, TINY, 1e300], [-TINY, -1]),
    "damping": ("at least 0", [0, TINY, 1e300], [-TINY, -1]),
    "cg_iterations": ("whole number of at least 1", [1, 10**6], [0, -1, 1.5, np.float64(2)]),
    "cg_tolerance": ("in [0, 1)", [0, BELOW_ONE], [-TINY, 1, 1.0]),
    "backtrack_ratio": ("strictly between 0 and 1", [TINY, BELOW_ONE], [0, 0.0, 1, 1.0]),
    "max_backtracks": ("whole number from 0 to 100", [0, 100], [-1, 101, 0.5, 2.0]),
    "improvement_ratio": ("in [0, 1)", [0, BELOW_ONE], [-TINY, 1, 1.0]),
}
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
}
NOT_A_NUMBER = ["0.5", True, np.True_, torch.tensor(0.5), np.array(0.5), 0.5j, [0.5]]
NOT_FINITE = [math.nan, math.inf, -math.inf, np.float64("nan")]
WHOLE = ("cg_iterations", "max_backtracks")
SHARES = ("cg_tolerance", "backtrack_ratio", "improvement_ratio")  # no whole number but 0
KINDS: list[tuple[str, Any]] = [
    *((name, kind(1)) for name in WHOLE for kind in (np.int8, np.int64)),
    *((name, kind(1)) for name in NUMBERS if name not in SHARES for kind in (int, np.int64)),
    *(
        (name, kind(0.25))
        for name in NUMBERS
        if name not in WHOLE
        for kind in (np.float16, np.float32, np.float64)
    ),
]

each_number = pytest.mark.parametrize("name", NUMBERS)
each_hyperparameter = pytest.mark.parametrize("name", Hyperparameters.names())


def parameter() -> nn.Parameter:
    return nn.Parameter(torch.zeros(3, dtype=torch.float64))


def build(**changes: Any) -> TrustRegionOptimizer:
    return TrustRegionOptimizer([parameter()], **changes)


def mode_of(name: str) -> dict[str, Any]:
    return {"mode": "vanilla", "lr": 1.0} if name == "max_norm" else {}


def quadratic(*parameters: Tensor) -> Callable[[], tuple[Tensor, Tensor]]:
    """A closure whose KL is half the squared distance from here."""
    old = [each.detach().clone() for each in parameters]

    def closure() -> tuple[Tensor, Tensor]:
        moves = [each - start for each, start in zip(parameters, old, strict=True)]
        kl = torch.stack([0.5 * move.square().sum() for move in moves]).sum()
        return -torch.stack([each.sum() for each in parameters]).sum(), kl

    return closure


def names_value_and_limit(name: str, value: Any) -> str:
    return f"^{name} is {re.escape(repr(value))}; .*{re.escape(NUMBERS[name][0])}"


def disagreement(name: str) -> str:
    other = re.escape(f"{OTHER[name]!r} in param_groups[1]")
    return rf"^{name} is .* in param_groups\[0\] and {other}\..*the same value"


@pytest.mark.parametrize(
    ("name", "value"), [(name, value) for name, row in NUMBERS.items() for value in row[1]]
)
def test_values_just_inside_a_bound_are_kept_in_defaults_and_groups(
    name: str, value: float
) -> None:
    optimizer = build(**mode_of(name), **{name: value})
    assert optimizer.defaults[name] == optimizer.param_groups[0][name] == value


@pytest.mark.parametrize(
    ("name", "value"), [(name, value) for name, row in NUMBERS.items() for value in row[2]]
)
def test_values_just_outside_a_bound_are_refused_by_name_value_and_limit(
    name: str, value: float
) -> None:
    with pytest.raises(TrustRegionError, match=names_value_and_limit(name, value)):
        build(**mode_of(name), **{name: value})


@each_number
@pytest.mark.parametrize("value", NOT_A_NUMBER + NOT_FINITE, ids=repr)
def test_what_is_not_a_finite_number_is_refused(name: str, value: Any) -> None:
    with pytest.raises(TrustRegionError, match=names_value_and_limit(name, value)):
        build(**mode_of(name), **{name: value})


@each_number
@pytest.mark.parametrize("value", [10**400, -(10**400)], ids=["huge", "-huge"])
def test_integers_beyond_every_float_are_refused(name: str, value: int) -> None:
    with pytest.raises(TrustRegionError, match=names_value_and_limit(name, value)):
        build(**mode_of(name), **{name: value})


@pytest.mark.parametrize("name", sorted(NUMBERS.keys() - {"max_kl", "max_norm", "lr", "damping"}))
def test_none_is_refused_where_a_number_is_needed(name: str) -> None:
    with pytest.raises(TrustRegionError, match=names_value_and_limit(name, None)):
        build(**{name: None})


@pytest.mark.parametrize(
    "mode", ["ppo", "TRPO", "", None, 0, b"trpo", ["trpo"], np.array("trpo")], ids=repr
)
def test_unknown_modes_are_refused_with_the_choices(mode: Any) -> None:
    expected = f"mode is {mode!r}; it must be 'trpo', 'natural' or 'vanilla'"
    with pytest.raises(TrustRegionError, match=re.escape(expected)):
        build(mode=mode)


@pytest.mark.parametrize("value", [0, 1, None, "yes", torch.tensor(True)], ids=repr)
def test_maximize_takes_nothing_but_a_bool(value: Any) -> None:
    expected = f"maximize is {value!r}; it must be True or False"
    with pytest.raises(TrustRegionError, match=re.escape(expected)):
        build(maximize=value)


@pytest.mark.parametrize("mode", ["trpo", "vanilla"])
def test_only_natural_goes_without_a_radius(mode: str) -> None:
    assert build(mode="natural", max_kl=None, lr=0.1).param_groups[0]["max_kl"] is None
    with pytest.raises(TrustRegionError, match=f"max_kl is None with mode='{mode}'; .*natural"):
        build(mode=mode, max_kl=None, lr=0.1)


@pytest.mark.parametrize("mode", ["trpo", "natural"])
def test_only_vanilla_takes_an_l2_ball(mode: str) -> None:
    assert build(mode="vanilla", max_norm=2.0).param_groups[0]["max_norm"] == 2.0
    with pytest.raises(TrustRegionError, match=f"max_norm is 2.0 with mode='{mode}'; .*vanilla"):
        build(mode=mode, max_norm=2.0)


def test_defaults_are_the_same_in_the_signature_and_in_the_record() -> None:
    assert build().defaults == asdict(Hyperparameters())


RATES = [{"mode": "vanilla"}, {"mode": "natural", "max_kl": None}]


@pytest.mark.parametrize("settings", RATES, ids=str)
def test_where_lr_is_the_rate_it_must_be_given(settings: dict[str, Any]) -> None:
    with pytest.raises(TrustRegionError, match=r"lr was not given.*Pass lr, for example"):
        build(**settings)
    assert build(**settings, lr=0.3).param_groups[0]["lr"] == 0.3
    groups = [{"params": [parameter()], "lr": 0.3}]
    assert TrustRegionOptimizer(groups, **settings).param_groups[0]["lr"] == 0.3


def test_with_a_length_of_its_own_vanilla_needs_no_lr() -> None:
    assert build(mode="vanilla", max_norm=0.1).param_groups[0]["lr"] == 1.0


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


@pytest.mark.parametrize(("name", "value"), KINDS, ids=str)
def test_every_kind_of_number_becomes_a_plain_one(name: str, value: Any) -> None:
    optimizer = build(**mode_of(name), **{name: value})
    for kept in (optimizer.defaults[name], optimizer.param_groups[0][name]):
        assert type(kept) is (int if name in WHOLE else float)
        assert kept == value


def test_a_numpy_string_for_the_mode_becomes_a_plain_one() -> None:
    optimizer = build(mode=np.str_("natural"))
    for kept in (optimizer.defaults["mode"], optimizer.param_groups[0]["mode"]):
        assert type(kept) is str
        assert kept == "natural"


@pytest.mark.parametrize(("name", "value"), [("lr", np.float64(0.5)), ("mode", np.str_("natural"))])
def test_a_numpy_value_set_on_a_group_is_plain_again_after_a_step(name: str, value: Any) -> None:
    optimizer = build()
    optimizer.param_groups[0][name] = value
    optimizer.step(quadratic(optimizer.param_groups[0]["params"][0]))
    file = io.BytesIO()
    torch.save(optimizer.state_dict(), file)
    file.seek(0)
    assert torch.load(file, weights_only=True)["param_groups"][0][name] == value


def test_hyperparameters_are_keyword_only() -> None:
    anything: Any = TrustRegionOptimizer
    with pytest.raises(TypeError, match="positional"):
        anything([parameter()], "trpo")


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


@each_hyperparameter
def test_groups_that_disagree_are_refused_at_construction(name: str) -> None:
    groups: list[dict[str, Any]] = [{"params": [parameter()]} for _ in range(2)]
    groups[1][name] = OTHER[name]
    with pytest.raises(TrustRegionError, match=disagreement(name)):
        TrustRegionOptimizer(groups, **BASE.get(name, {}))


@each_hyperparameter
def test_a_group_that_disagrees_is_not_added(name: str) -> None:
    optimizer = build(**BASE.get(name, {}))
    state = optimizer.state_dict()
    with pytest.raises(TrustRegionError, match=disagreement(name)):
        optimizer.add_param_group({"params": [parameter()], name: OTHER[name]})
    assert optimizer.state_dict() == state


@each_hyperparameter
def test_groups_that_come_to_disagree_are_refused_at_the_step(name: str) -> None:
    weights = [parameter(), parameter()]
    groups = [{"params": [weight]} for weight in weights]
    optimizer = TrustRegionOptimizer(groups, **BASE.get(name, {}))
    optimizer.param_groups[1][name] = OTHER[name]
    with pytest.raises(TrustRegionError, match=disagreement(name)):
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
