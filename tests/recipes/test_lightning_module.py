"""The recipe for Lightning learns, and Lightning's checkpoints hold both optimizers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gymnasium as gym
import pytest
import torch
from torch.utils.data import DataLoader

pytestmark = [
    pytest.mark.recipes,
    pytest.mark.filterwarnings("default"),  # the library's own are not errors here
]
recipe = pytest.importorskip("lightning_module")


def test_it_learns_cart_pole() -> None:
    assert recipe.main(seed=0) > 350


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
def test_a_step_stays_in_the_trust_region(precision: str) -> None:
    module, report = trained(precision)
    assert report.accepted
    assert 0.005 < report.kl <= module.max_kl


def test_a_checkpoint_holds_both_optimizers(tmp_path: Path) -> None:
    module, _ = trained("32-true")
    module.trainer.save_checkpoint(tmp_path / "run.ckpt")
    saved = torch.load(tmp_path / "run.ckpt", weights_only=False)["optimizer_states"]
    assert [each["param_groups"][0].get("max_kl") for each in saved] == [module.max_kl, None]


def trained(precision: str) -> tuple[Any, Any]:
    """Return a module after one update, and its report."""
    recipe.lightning.seed_everything(0)
    envs = gym.make_vec("CartPole-v1", num_envs=8, vectorization_mode="sync")
    module = recipe.ActorCritic(4, 2)
    trainer = recipe.make_trainer(updates=1, precision=precision)
    trainer.fit(module, DataLoader(recipe.Rollouts(module, envs, seed=0), batch_size=None))
    return module, module.last_report
