"""Which parameters share memory, decided by elements, and what is said of those that do."""

from __future__ import annotations

import itertools
import re
from collections.abc import Callable
from typing import Any

import hypothesis
import pytest
import torch
from hypothesis import strategies as st
from problems import MODES
from torch import Tensor, nn

from trpo_optim import TrustRegionError, TrustRegionOptimizer
from trpo_optim.closure.parameters import trainable
from trpo_optim.closure.shared_memory import share_memory

BASE = torch.arange(24.0)


def addresses(tensor: Tensor) -> set[int]:
    """Every byte of every element, one by one."""
    width = tensor.element_size()
    return {
        tensor[place].data_ptr() + byte
        for place in itertools.product(*map(range, tensor.shape))
        for byte in range(width)
    }


VIEWS: list[Tensor] = [
    BASE,
    BASE[:12],
    BASE[12:],
    BASE[::2],
    BASE[1::2],
    BASE[1::3],
    BASE[5:6],
    BASE[3:3],
    BASE[0].expand(4),
    *BASE.view(6, 4).unbind(1),
    BASE.view(6, 4)[:, 1:3],
    BASE.view(4, 6).T,
    BASE.view(2, 3, 4)[:, ::2, ::3],
    BASE.unfold(0, 5, 3),
    torch.view_as_real(BASE.view(torch.complex64)[1::2])[:, 1],
    BASE.view(torch.int16)[1::2],
    BASE.view(torch.int16)[::4],
    BASE.view(torch.float64)[::2],
    torch.zeros(24),
]


@pytest.mark.parametrize("first", range(len(VIEWS)))
def test_two_views_share_memory_where_their_elements_do(first: int) -> None:
    for second in VIEWS:
        expected = bool(addresses(VIEWS[first]) & addresses(second))
        assert share_memory(VIEWS[first], second) is expected


@hypothesis.given(
    st.lists(
        st.tuples(
            st.integers(0, 12),
            st.lists(st.tuples(st.integers(1, 4), st.integers(0, 9)), max_size=3),
        ),
        min_size=2,
        max_size=2,
    )
)
def test_any_two_strided_views_share_memory_where_their_elements_do(
    views: list[tuple[int, list[tuple[int, int]]]],
) -> None:
    memory = torch.zeros(100)
    first, second = (
        memory.as_strided([n for n, _ in each], [stride for _, stride in each], start)
        for start, each in views
    )
    assert share_memory(first, second) is bool(addresses(first) & addresses(second))
    distinct = len(addresses(first)) == 4 * first.numel()
    first.requires_grad_()
    if distinct:
        assert list(map(id, trainable([{"params": [first]}]))) == [id(first)]
    else:
        with pytest.raises(TrustRegionError, match="several of them are one number"):
            trainable([{"params": [first]}])


def shared_by_data() -> list[nn.Parameter]:
    first, second = nn.Parameter(torch.zeros(2, 3)), nn.Parameter(torch.zeros(2, 3))
    second.data = first.data
    return [first, second]


def viewed(*views: Callable[[Tensor], Tensor]) -> list[nn.Parameter]:
    memory = torch.zeros(4, 4)
    return [nn.Parameter(view(memory)) for view in views]


SHARED: dict[str, Callable[[], list[nn.Parameter]]] = {
    "the same memory": shared_by_data,
    "transposed": lambda: viewed(lambda x: x, lambda x: x.T),
    "overlapping rows": lambda: viewed(lambda x: x[:3], lambda x: x[2:]),
    "overlapping columns": lambda: viewed(lambda x: x[:, :3], lambda x: x[:, 2:]),
    "a row and a column": lambda: viewed(lambda x: x[1], lambda x: x[:, 2]),
}


@pytest.mark.parametrize("kind", SHARED)
@pytest.mark.parametrize("form", ["plain", "named", "groups"])
def test_two_parameters_that_share_memory_are_refused_by_name(kind: str, form: str) -> None:
    parameters = SHARED[kind]()
    forms: dict[str, tuple[Any, str]] = {
        "plain": (parameters, "0 and 1"),
        "named": (
            zip(("a.weight", "b.weight"), parameters, strict=True),
            "'a.weight' and 'b.weight'",
        ),
        "groups": ([{"params": [each]} for each in parameters], "0 and 0 of param_groups[1]"),
    }
    given, names = forms[form]
    with pytest.raises(
        TrustRegionError,
        match=f"^Parameters {re.escape(names)} .*share memory.*b.weight = a.weight",
    ):
        TrustRegionOptimizer(given)


def step(parameters: list[nn.Parameter], optimizer: TrustRegionOptimizer) -> Any:
    """Take a step whose KL is half the squared distance, each parameter used once."""
    old = [each.detach().clone() for each in parameters]

    def closure() -> tuple[Tensor, Tensor]:
        kl = torch.stack(
            [
                0.5 * (each - start).square().sum()
                for each, start in zip(parameters, old, strict=True)
            ]
        ).sum()
        return -torch.stack([each.sum() for each in parameters]).sum(), kl

    return optimizer.step(closure)


@pytest.mark.parametrize("mode", MODES)
def test_memory_that_comes_to_be_shared_later_is_refused_at_the_step(mode: str) -> None:
    policy = nn.ModuleDict({"a": nn.Linear(3, 2), "b": nn.Linear(3, 2)})
    settings: Any = {"mode": mode, "lr": 0.1}
    optimizer = TrustRegionOptimizer(policy.named_parameters(), **settings)
    first, second = policy["a"], policy["b"]
    assert isinstance(first, nn.Linear)
    assert isinstance(second, nn.Linear)
    second.weight.data = first.weight.data
    with pytest.raises(TrustRegionError, match=r"^Parameters 'a.weight' and 'b.weight' are"):
        step(list(policy.parameters()), optimizer)
    first.weight.requires_grad_(False)
    assert trainable(optimizer.param_groups)


def test_a_group_that_shares_memory_with_an_earlier_one_is_not_added() -> None:
    first, second = shared_by_data()
    optimizer = TrustRegionOptimizer([first])
    with pytest.raises(TrustRegionError, match="share memory"):
        optimizer.add_param_group({"params": [second]})
    assert len(optimizer.param_groups) == 1


@pytest.mark.parametrize("mode", MODES)
def test_columns_of_one_matrix_are_parameters_of_their_own(mode: str) -> None:
    matrix = torch.zeros(5, 3, dtype=torch.float64)
    first, second = nn.Parameter(matrix[:, 0]), nn.Parameter(matrix[:, 2])
    constant = matrix[:, 1]
    copies = [nn.Parameter(torch.zeros(5, dtype=torch.float64)) for _ in range(2)]

    def closure_of(*parameters: Tensor) -> Callable[[], tuple[Tensor, Tensor]]:
        def closure() -> tuple[Tensor, Tensor]:
            means = torch.stack([parameters[0] + constant, parameters[1] - constant])
            return -(means * torch.arange(5)).sum(), 0.5 * means.square().sum()

        return closure

    settings: Any = {"mode": mode, "lr": 0.1}
    report = TrustRegionOptimizer([first, second], **settings).step(closure_of(first, second))
    expected = TrustRegionOptimizer(copies, **settings).step(closure_of(*copies))
    assert report == expected
    assert report.accepted
    torch.testing.assert_close([first, second], copies)
    assert not constant.any()


@pytest.mark.parametrize("mode", MODES)
def test_a_constant_that_shares_an_element_with_a_parameter_is_still_refused(mode: str) -> None:
    matrix = torch.zeros(5, 3)
    parameter, row = nn.Parameter(matrix[:, 0]), matrix[1]
    settings: Any = {"mode": mode, "lr": 0.1}
    optimizer = TrustRegionOptimizer([parameter], **settings)
    with pytest.raises(TrustRegionError, match="shares memory with a parameter"):
        optimizer.step(lambda: (-(parameter.sum() + row.sum()), 0.5 * parameter.square().sum()))


@pytest.mark.parametrize("alone", [True, False])
@pytest.mark.parametrize(
    "make",
    [
        lambda: torch.zeros(1).expand(3),
        lambda: torch.zeros(3, 1).expand(3, 2),
        lambda: torch.zeros(6).unfold(0, 3, 1),
    ],
)
def test_a_parameter_whose_elements_are_one_number_is_refused_by_name(
    make: Callable[[], Tensor], alone: bool
) -> None:
    named = [("scale", nn.Parameter(make()))]
    named += [] if alone else [("weight", nn.Parameter(torch.zeros(2)))]
    with pytest.raises(
        TrustRegionError, match=r"^Parameter 'scale' has \d+ elements.*expand it in forward\(\)"
    ):
        TrustRegionOptimizer(named)
    named[0][1].requires_grad_(False)
    if not alone:  # what is never moved may be anything
        assert step([named[1][1]], TrustRegionOptimizer(named)).accepted


def test_the_same_parameter_twice_is_one() -> None:
    tied = nn.Parameter(torch.zeros(3))
    with pytest.warns(UserWarning, match="duplicate parameters"):
        optimizer = TrustRegionOptimizer([tied, tied])
    assert step([tied], optimizer).accepted
    assert [id(each) for each in trainable(optimizer.param_groups)] == [id(tied)]


@pytest.mark.parametrize("mode", MODES)
def test_parameters_on_meta_are_refused_with_the_way_to_give_them_values(mode: str) -> None:
    policy = nn.Linear(3, 2, device="meta")
    settings: Any = {"mode": mode, "lr": 0.1}
    optimizer = TrustRegionOptimizer(policy.parameters(), **settings)
    with pytest.raises(TrustRegionError, match=r"lie on the device 'meta'.*to_empty\(device=...\)"):
        step(list(policy.parameters()), optimizer)
