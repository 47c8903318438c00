"""The recipe for Stable-Baselines3 learns, takes every action space, and is saved by SB3."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
import torch
from gymnasium.spaces import Box, Discrete, MultiBinary, MultiDiscrete

sb3_recipe = pytest.importorskip("stable_baselines3_ppo")
pytestmark = [
    pytest.mark.recipes,
    pytest.mark.filterwarnings("default"),  # the library's own are not errors here
]

SPACES = [Discrete(3), MultiDiscrete([2, 3]), MultiBinary(4), Box(-1, 1, (2,))]


class Noise(gym.Env[Any, Any]):
    """Random observations; the reward is the sum of the action."""

    observation_space = Box(-1, 1, (3,))

    def __init__(self, actions: gym.Space[Any]) -> None:
        self.action_space = actions

    def reset(self, **arguments: Any) -> tuple[Any, dict[str, Any]]:
        super().reset(**arguments)
        return self.observation_space.sample(), {}

    def step(self, action: Any) -> tuple[Any, float, bool, bool, dict[str, Any]]:
        ends = bool(self.np_random.random() < 0.1)
        return self.observation_space.sample(), float(action.sum()), ends, False, {}


def make_model(env: Any, **settings: Any) -> Any:
    return sb3_recipe.TrustRegionPPO(
        "MlpPolicy", env, n_steps=128, seed=0, device="cpu", **settings
    )


def test_it_learns_cart_pole() -> None:
    assert sb3_recipe.main(seed=0) > 400


@pytest.mark.parametrize("actions", SPACES, ids=str)
def test_a_step_stays_in_the_trust_region_for_every_action_space(actions: Any) -> None:
    model = make_model(Noise(actions), target_kl=0.02).learn(128)
    report = model.trust_region.last_report
    assert report.accepted
    assert report.engine == "Gauss-Newton"
    assert 0.01 < report.kl <= 0.02


def test_adam_moves_the_value_network_alone() -> None:
    model = make_model("CartPole-v1").learn(128)
    observations = torch.randn(64, 4)
    before = outputs(model, observations)
    model.fit_value_network()
    after = outputs(model, observations)
    assert torch.equal(after[0], before[0])
    assert not torch.equal(after[1], before[1])


@torch.no_grad()
def outputs(model: Any, observations: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    return model.dist(observations).logits, model.policy.predict_values(observations)


def test_a_loaded_model_goes_on_with_its_radius(tmp_path: Path) -> None:
    model = make_model("CartPole-v1", target_kl=0.005).learn(128)
    model.save(tmp_path / "model.zip")
    loaded = sb3_recipe.TrustRegionPPO.load(tmp_path / "model.zip", env=model.env)
    assert loaded.trust_region.state_dict() == model.trust_region.state_dict()
    loaded.learn(128)
    assert 0 < loaded.trust_region.last_report.kl <= 0.005


def test_a_shared_features_extractor_with_parameters_is_refused() -> None:
    pictures = gym.make("CartPole-v1")
    pictures.observation_space = Box(0, 255, (36, 36, 3), np.uint8)
    with pytest.raises(ValueError, match="share a features extractor"):
        sb3_recipe.TrustRegionPPO("CnnPolicy", pictures, device="cpu")
