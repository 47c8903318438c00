"""The recipe for Tianshou learns, and Tianshou's state_dict has both optimizers."""

from __future__ import annotations

import gymnasium as gym
import pytest

pytestmark = [
    pytest.mark.recipes,
    pytest.mark.filterwarnings("default"),  # the library's own are not errors here
]
tianshou_loop = pytest.importorskip("tianshou_loop")


def test_it_learns_cart_pole() -> None:
    assert tianshou_loop.main(seed=0) > 400


def test_the_state_of_both_optimizers_is_saved() -> None:
    first, second = (tianshou_loop.make_algorithm(gym.make("CartPole-v1")) for _ in range(2))
    first.trust_region.param_groups[0]["max_kl"] = 0.005
    second.load_state_dict(first.state_dict())
    assert second.trust_region.param_groups[0]["max_kl"] == 0.005
