"""Contents that are hard to compare or to copy: NaN, signs of zero, NumPy, lists that change."""

from __future__ import annotations

import random
from collections import deque
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.distributions import Categorical

from trpo_optim import StepReport, TrustRegionOptimizer, frozen, mean_kl


class Writing(nn.Module):
    """A policy that writes its attributes whenever it runs.

    Args:
        write: Takes the policy.
        attributes: What it holds.
    """

    count: Any
    array: Any
    items: Any
    named: Any
    nested: Any
    rms: Any
    zeros: Any

    def __init__(self, write: Callable[[Writing], object], **attributes: Any) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.linear, self.write = nn.Linear(2, 2), write
        for name, value in attributes.items():
            setattr(self, name, value)

    def forward(self, x: Tensor) -> Categorical:
        self.write(self)
        return Categorical(logits=self.linear(x))

    def step(self, look: Callable[[Writing], object]) -> tuple[StepReport, list[Any]]:
        """Take a step; return the report, and what was seen before each evaluation and after."""
        x, actions, advantages = torch.randn(6, 2), torch.tensor([0, 1] * 3), torch.randn(6)
        old = frozen(Categorical(logits=self.linear(x)))
        seen = []

        def closure() -> Any:
            seen.append(look(self))
            dist = self(x)
            ratio = (dist.log_prob(actions) - old.log_prob(actions)).exp()
            return -(ratio * advantages).mean(), mean_kl(old, dist), dist

        report = TrustRegionOptimizer(self.parameters()).step(closure)
        assert report.accepted
        return report, [*seen, look(self)]


def plus_one(policy: Writing) -> None:
    policy.count += 1


@pytest.mark.parametrize("value", [0.0, torch.nan])
def test_a_tensor_that_is_not_written_moves_no_number_even_if_it_holds_nan(value: float) -> None:
    policy = Writing(plus_one, plain=torch.full((2,), value), count=0)
    report, _ = policy.step(lambda policy: None)
    assert policy.count == report.closure_evaluations


def test_read_only_memory_that_holds_nan_is_not_written(tmp_path: Path) -> None:
    np.array([0.0, np.nan], np.float32).tofile(tmp_path / "table")
    with pytest.warns(UserWarning, match="not writable"):
        table = torch.from_numpy(np.memmap(tmp_path / "table", np.float32, "r"))
    policy = Writing(lambda _: None, table=nn.Buffer(table))
    policy.step(lambda policy: None)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.complex64, torch.int32])
def test_the_bits_are_put_back_also_the_sign_of_zero(dtype: torch.dtype) -> None:
    policy = Writing(lambda policy: policy.zeros.neg_(), zeros=torch.zeros(2, dtype=dtype))
    _, seen = policy.step(lambda policy: bytes(policy.zeros.clone().view(torch.uint8).tolist()))
    assert len(seen) > 2
    assert set(seen) == {bytes(len(seen[0]))}


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
def test_a_nested_tensor_is_put_back() -> None:
    nested = torch.nested.nested_tensor([torch.zeros(2), torch.zeros(3)])
    policy = Writing(lambda policy: policy.nested.add_(1.0), nested=nested)
    _, seen = policy.step(lambda policy: [each.tolist() for each in policy.nested.unbind()])
    assert seen == [[[0.0] * 2, [0.0] * 3]] * len(seen)


class RunningMean:
    """As in normalisers that keep their statistics in NumPy arrays."""

    def __init__(self) -> None:
        self.mean, self.count = np.zeros(2), 1e-4

    def update(self) -> None:
        self.mean = self.mean + 1
        self.count += 5


def test_a_running_mean_in_numpy_goes_back_with_its_count() -> None:
    policy = Writing(lambda policy: policy.rms.update(), rms=RunningMean())
    _, seen = policy.step(lambda policy: (policy.rms.mean.tolist(), policy.rms.count))
    assert seen == [([0.0, 0.0], 1e-4)] * len(seen)


ARRAYS = {
    "in a row": np.zeros((2, 3)),
    "transposed": np.zeros((3, 2)).T,
    "objects": np.array([0, None], dtype=object),
    "a single number": np.zeros(()),
    "empty": np.zeros((0, 2)),
}


@pytest.mark.parametrize("name", ARRAYS)
def test_arrays_of_every_layout_are_put_back(name: str) -> None:
    policy = Writing(lambda policy: policy.array.fill(7), array=ARRAYS[name].copy("K"))
    before = policy.array.tolist()
    _, seen = policy.step(lambda policy: policy.array.tolist())
    assert seen == [before] * len(seen)


SHRINKING: dict[str, Callable[[Any], object]] = {
    "the last": lambda items: items.pop(),
    "the first": lambda items: items.popleft() if isinstance(items, deque) else items.pop(0),
    "all": lambda items: items.clear(),
}


@pytest.mark.parametrize("kind", [list, deque])
@pytest.mark.parametrize("name", SHRINKING)
def test_a_list_that_loses_items_gets_them_back_in_their_places(
    name: str, kind: Callable[[Any], Any]
) -> None:
    items = [torch.zeros(1), 3, torch.ones(1), None]
    policy = Writing(lambda policy: SHRINKING[name](policy.items), items=kind(items))
    _, seen = policy.step(lambda policy: list(map(id, policy.items)))
    assert seen == [list(map(id, items))] * len(seen)


NINE, TENSOR = 9.0, torch.ones(2)


def slide(items: Any) -> None:
    del items[0], items[0]
    items.extend([NINE, TENSOR])
    items.append(None)


def exchange_and_append(items: Any) -> None:
    items[0] += 1.0
    items.append(NINE)


ADDED: dict[str, tuple[Callable[[Any], object], list[Any]]] = {
    "at the end": (lambda items: items.append(NINE), [NINE]),
    "in front": (lambda items: items.insert(0, NINE), [NINE]),
    "within": (lambda items: items.insert(2, NINE), [NINE]),
    "tensors": (lambda items: items.extend([TENSOR, TENSOR]), [TENSOR, TENSOR]),
    "a tensor in front": (lambda items: items.insert(0, TENSOR), [TENSOR]),
    "what it holds already": (lambda items: items.insert(0, items[1]), ["the same"]),
    "at the end, and loses others": (slide, [NINE, TENSOR, None]),
    "at the end, beside a new value": (exchange_and_append, [NINE]),
}


@pytest.mark.parametrize("kind", [list, deque])
@pytest.mark.parametrize("name", ADDED)
def test_what_a_list_gains_is_gone_before_the_next_evaluation(
    name: str, kind: Callable[[Any], Any]
) -> None:
    items = [0.5, "the same", torch.zeros(1), 2.5]
    write, added = ADDED[name]
    policy = Writing(lambda policy: write(policy.items), items=kind(items))
    _, seen = policy.step(lambda policy: list(map(id, policy.items)))
    assert seen[:-1] == [list(map(id, items))] * (len(seen) - 1)
    assert seen[-1] == list(map(id, [*items, *added]))  # what the last evaluation adds


def test_what_a_list_gains_in_front_has_no_graph() -> None:
    policy = Writing(lambda policy: policy.items.insert(0, policy.linear.weight * 1), items=[1.0])
    policy.step(lambda policy: None)
    assert [type(each) for each in policy.items] == [float, Tensor]
    assert not policy.items[1].requires_grad


def test_a_deque_gains_as_much_as_there_is_room_for() -> None:
    policy = Writing(lambda policy: policy.items.extend([8.0, 9.0]), items=deque([1.0, 2.0], 3))
    _, seen = policy.step(lambda policy: list(policy.items))
    assert seen == [[1.0, 2.0]] * (len(seen) - 1) + [[1.0, 2.0, 8.0]]


@pytest.mark.parametrize("items", [[1.0, 2.0, 3.0], [torch.zeros(1), 2.0, torch.ones(1)]])
def test_a_full_deque_is_put_back(items: list[Any]) -> None:
    def write(policy: Writing) -> None:
        policy.items.append(9.0)

    policy = Writing(write, items=deque(items, maxlen=3))
    _, seen = policy.step(lambda policy: list(map(id, policy.items)))
    assert seen == [list(map(id, items))] * len(seen)


@pytest.mark.parametrize(
    "value", [0.5, "text", np.zeros(2), torch.zeros(2), [1.0], {"a": 1.0}, object()], ids=type
)
def test_what_was_empty_is_empty_at_the_start_of_every_evaluation(value: Any) -> None:
    def write(policy: Writing) -> None:
        policy.items.append(value)
        policy.named["last"] = value

    policy = Writing(write, items=[], named={})
    _, seen = policy.step(lambda policy: (len(policy.items), len(policy.named)))
    assert seen == [(0, 0)] * (len(seen) - 1) + [(1, 1)]


def test_a_generator_without_a_state_is_left_alone() -> None:
    policy = Writing(lambda policy: policy.items[0].random(), items=[random.SystemRandom()])
    before = policy.items[0]
    _, seen = policy.step(lambda policy: policy.items)
    assert all(items == [before] for items in seen)


def test_a_masked_array_is_put_back() -> None:
    array = np.ma.MaskedArray([1.0, 2.0], mask=[False, True])
    policy = Writing(lambda policy: policy.array.fill(7), array=array)
    _, seen = policy.step(lambda policy: policy.array.data.tolist())
    assert seen == [[1.0, 2.0]] * len(seen)
