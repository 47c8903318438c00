"""Advantages within the completions of a prompt."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from trpo_optim import TrustRegionError
from trpo_optim.tokens import group_advantages


@pytest.mark.parametrize("scale", ["std", "none"])
def test_each_prompt_has_its_own_mean_and_deviation(scale: Any) -> None:
    torch.manual_seed(0)
    rewards = torch.randn(12, dtype=torch.float64) * 3 + 7
    ours = group_advantages(rewards, 4, scale=scale)
    expected = []
    for start in (0, 4, 8):
        group = [float(each) for each in rewards[start : start + 4]]
        mean = sum(group) / 4
        deviation = math.sqrt(sum((each - mean) ** 2 for each in group) / 4)
        expected += [(each - mean) / (deviation if scale == "std" else 1) for each in group]
    assert ours.tolist() == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize("scale", ["std", "none"])
def test_equal_rewards_give_zero(scale: Any) -> None:
    torch.manual_seed(0)
    equal = torch.randn(100, dtype=torch.float64).repeat_interleave(7)
    different = torch.tensor([1.0] + [0.0] * 6, dtype=torch.float64)
    advantages = group_advantages(torch.cat([equal, different]), 7, scale=scale)
    assert torch.equal(advantages == 0, torch.arange(707) < 700)


def test_rewards_that_differ_by_rounding_are_equal() -> None:
    rewards = torch.tensor([0.1 + 0.2, 0.3, 0.3], dtype=torch.float64)
    assert rewards[0] != rewards[1]
    assert group_advantages(rewards, 3).tolist() == [0, 0, 0]
    small = torch.tensor([1e-12, 0.0, 0.0], dtype=torch.float64)
    assert group_advantages(small, 3)[0] > 1


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        (torch.bool, torch.float32),
        (torch.int64, torch.float32),
        (torch.bfloat16, torch.float32),
        (torch.float32, torch.float32),
        (torch.float64, torch.float64),
    ],
)
def test_rewards_may_be_of_any_type(given: torch.dtype, expected: torch.dtype) -> None:
    advantages = group_advantages(torch.tensor([0, 1, 1, 0]).to(given), 2)
    assert advantages.dtype is expected
    assert advantages.tolist() == [-1, 1, 1, -1]


@pytest.mark.parametrize(
    ("rewards", "size", "scale", "words"),
    [
        (torch.zeros(10), 4, "std", ["(10,)", "group_size is 4", "multiple"]),
        (torch.zeros(5, 2), 2, "std", ["(5, 2)", "(N,)"]),
        (torch.zeros(0), 2, "std", ["(0,)"]),
        (torch.zeros(4), 1, "std", ["group_size is 1", "at least 2"]),
        (torch.zeros(4), 2.0, "std", ["group_size is 2.0"]),
        (torch.tensor([0.0, math.nan]), 2, "std", ["completion 1 is nan"]),
        (torch.tensor([-math.inf, 0.0]), 2, "none", ["completion 0 is -inf"]),
        (torch.zeros(4), 2, "mean", ["'mean'", "'std' or 'none'"]),
    ],
)
def test_what_does_not_fit_is_an_error_with_its_remedy(
    rewards: Any, size: Any, scale: Any, words: list[str]
) -> None:
    with pytest.raises(TrustRegionError) as error:
        group_advantages(rewards, size, scale=scale)
    assert all(word in str(error.value) for word in words), error.value


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_rewards_in_half_precision_differ_as_their_numbers_do(dtype: torch.dtype) -> None:
    rewards = torch.tensor([10.0, 10.25, 10.5, 10.75])
    for scale in ("std", "none"):
        advantages = group_advantages(rewards.to(dtype), 4, scale=scale)
        assert torch.equal(advantages, group_advantages(rewards, 4, scale=scale))
        assert advantages.all()
