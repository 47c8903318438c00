"""The recipe for skrl learns, and refuses what would leave the trust region."""

from __future__ import annotations

import gymnasium as gym
import pytest

pytestmark = [
    pytest.mark.recipes,
    pytest.mark.filterwarnings("default"),  # the library's own are not errors here
]
skrl_agent = pytest.importorskip("skrl_agent")


def test_it_learns_cart_pole() -> None:
    assert skrl_agent.main(seed=0) > 300


def test_one_model_for_policy_and_value_is_refused() -> None:
    env = skrl_agent.wrap_env(gym.make_vec("CartPole-v1", num_envs=2, vectorization_mode="sync"))
    model = skrl_agent.Policy(env)
    with pytest.raises(ValueError, match="Pass two models"):
        skrl_agent.TrustRegionAgent(
            models={"policy": model, "value": model}, **skrl_agent.spaces(env)
        )
