"""Functions on nested values: what they are nested in survives."""

from __future__ import annotations

from collections import OrderedDict
from types import MappingProxyType
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor
from torch.distributions import Normal

from trpo_optim.distributions.nesting import mapped


class Memory(NamedTuple):
    """A recurrent state."""

    hidden: Any
    cell: Any


def doubled(value: Any) -> Any:
    return 2 * value


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (3, 6),
        ((1, 2), (2, 4)),
        ([1, (2, 3)], [2, (4, 6)]),
        ({"a": 1, "b": [2]}, {"a": 2, "b": [4]}),
        (OrderedDict(a=1), {"a": 2}),
        (MappingProxyType({"a": (1,)}), {"a": (2,)}),
        (Memory(1, (2, 3)), Memory(2, (4, 6))),
        ((), ()),
    ],
)
def test_the_result_is_nested_like_the_value(value: Any, expected: Any) -> None:
    found = mapped(doubled, value)
    assert found == expected
    assert type(found) is type(expected)


def test_several_values_are_taken_part_by_part_in_the_form_of_the_first() -> None:
    first, second = Memory({"a": 1}, [2]), ({"a": 10}, (20,))
    assert mapped(lambda one, other: one + other, first, second) == Memory({"a": 11}, [22])
    with pytest.raises(ValueError, match="longer"):
        mapped(lambda one, other: one + other, (1,), (1, 2))


def test_distributions_are_parts() -> None:
    found: dict[str, Tensor] = mapped(lambda dist: dist.mean, {"x": Normal(torch.ones(2), 1.0)})
    assert torch.equal(found["x"], torch.ones(2))
