"""Hyperparameters: bounds, types and messages, at the constructor."""

from __future__ import annotations

import math
import re
from dataclasses import asdict
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

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
NOT_A_NUMBER = ["0.5", True, np.True_, torch.tensor(0.5), np.array(0.5), 0.5j, [0.5]]
NOT_FINITE = [math.nan, math.inf, -math.inf, np.float64("nan")]
WHOLE = ("cg_iterations", "max_backtracks")
SHARES = ("cg_tolerance", "backtrack_ratio", "improvement_ratio")  # no whole number but 0

each_number = pytest.mark.parametrize("name", NUMBERS)


def parameter() -> nn.Parameter:
    return nn.Parameter(torch.zeros(3, dtype=torch.float64))


def build(**changes: Any) -> TrustRegionOptimizer:
    return TrustRegionOptimizer([parameter()], **changes)


def with_number(name: str, value: Any) -> TrustRegionOptimizer:
    """Build in a mode that takes the hyperparameter."""
    mode = {"mode": "vanilla", "lr": 1.0} if name == "max_norm" else {}
    return build(**{**mode, name: value})


def require_refused(name: str, value: Any) -> None:
    """Check that the message has the name, the value and the limit."""
    expected = f"^{name} is {re.escape(repr(value))}; .*{re.escape(NUMBERS[name][0])}"
    with pytest.raises(TrustRegionError, match=expected):
        with_number(name, value)


@each_number
def test_values_just_inside_a_bound_are_kept_and_those_just_outside_are_refused(name: str) -> None:
    _, inside, outside = NUMBERS[name]
    for value in inside:
        optimizer = with_number(name, value)
        assert optimizer.defaults[name] == optimizer.param_groups[0][name] == value
    for value in outside:
        require_refused(name, value)


@each_number
def test_what_is_not_a_finite_number_is_refused(name: str) -> None:
    needed = name not in ("max_kl", "max_norm", "lr", "damping")
    beyond_every_float = [10**400, -(10**400)]
    for value in [*NOT_A_NUMBER, *NOT_FINITE, *beyond_every_float, *[None] * needed]:
        require_refused(name, value)


@each_number
def test_every_kind_of_number_becomes_a_plain_one(name: str) -> None:
    whole = [np.int8(1), np.int64(1), 1]
    fractions = [np.float16(0.25), np.float32(0.25), np.float64(0.25)]
    kinds: list[Any] = whole[:2] if name in WHOLE else fractions
    kinds += [] if name in SHARES else whole[1:]
    for value in kinds:
        optimizer = with_number(name, value)
        for kept in (optimizer.defaults[name], optimizer.param_groups[0][name]):
            assert type(kept) is (int if name in WHOLE else float)
            assert kept == value


@pytest.mark.parametrize(
    ("name", "values", "limit"),
    [
        (
            "mode",
            ["ppo", "TRPO", "", None, 0, b"trpo", ["trpo"], np.array("trpo")],
            "'trpo', 'natural' or 'vanilla'",
        ),
        ("maximize", [0, 1, None, "yes", torch.tensor(True)], "True or False"),
    ],
)
def test_other_choices_are_refused_with_those_there_are(
    name: str, values: list[Any], limit: str
) -> None:
    for value in values:
        expected = re.escape(f"{name} is {value!r}; it must be {limit}")
        with pytest.raises(TrustRegionError, match=expected):
            build(**{name: value})


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


def test_a_numpy_string_for_the_mode_becomes_a_plain_one() -> None:
    optimizer = build(mode=np.str_("natural"))
    for kept in (optimizer.defaults["mode"], optimizer.param_groups[0]["mode"]):
        assert type(kept) is str
        assert kept == "natural"


def test_hyperparameters_are_keyword_only() -> None:
    anything: Any = TrustRegionOptimizer
    with pytest.raises(TypeError, match="positional"):
        anything([parameter()], "trpo")
