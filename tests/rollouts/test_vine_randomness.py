"""Vine beside random numbers: those that a policy draws itself, and generators of other devices."""

from __future__ import annotations

from typing import Any

import gymnasium as gym
import pytest
import torch
from devices import needs_gpu
from lakes import Swing, pendulums
from small_environments import vector
from torch import Tensor, nn
from torch.distributions import Categorical

from trpo_optim import TrustRegionOptimizer
from trpo_optim.closure.random_state import random_state_kept
from trpo_optim.rollouts import VineBatch, vine, vine_closure


class Forgetful(nn.Module):
    """A policy with dropout."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.network = nn.Sequential(nn.Linear(4, 32), nn.Tanh(), nn.Dropout(0.3), nn.Linear(32, 2))

    def forward(self, seen: Tensor) -> Categorical:
        return Categorical(logits=self.network(seen))


def grown(**options: Any) -> tuple[Forgetful, VineBatch]:
    policy, envs = Forgetful(), vector(lambda: gym.make("CartPole-v1"), 4)
    batch = vine(envs, policy, steps=30, states=20, horizon=25, gamma=0.9, seed=0, **options)
    return policy, batch


TRIED: dict[str, dict[str, Any]] = {
    "all": {},
    "policy": {"branches": 2},
    "uniform": {"branches": 2, "sampling": "uniform"},
}


@pytest.mark.parametrize("tried", TRIED)
@pytest.mark.parametrize("curvature", [None, 0.3])
def test_the_old_policy_and_the_new_one_draw_the_same_dropout(
    tried: str, curvature: float | None
) -> None:
    policy, batch = grown(**TRIED[tried])
    before = torch.get_rng_state()
    built = vine_closure(policy, batch, curvature=curvature)
    assert curvature is not None or torch.equal(torch.get_rng_state(), before)
    for closure in filter(None, [built, built.curvature]):
        with torch.no_grad(), random_state_kept(["cpu"]):
            kl = closure()[1]
        assert torch.equal(kl, torch.zeros_like(kl))
    report = TrustRegionOptimizer(policy.parameters()).step(built)
    assert report.accepted
    assert report.engine == "Gauss-Newton"
    assert report.kl <= 0.01


def test_on_the_cpu_no_other_devices_generator_is_seeded(monkeypatch: pytest.MonkeyPatch) -> None:
    policy, envs, seeded = Swing(), pendulums(), list[str]()
    for name in ("cuda", "mps", "xpu"):
        module: Any = getattr(torch, name)
        for call in ("manual_seed", "manual_seed_all", "seed", "set_rng_state", "get_rng_state"):
            if hasattr(module, call):
                monkeypatch.setattr(module, call, lambda *_, name=name, **__: seeded.append(name))
    torch.manual_seed(0)
    assert "cuda" in seeded  # what is watched for
    seeded.clear()
    vine(envs, policy, steps=2, states=3, branches=2, horizon=3, gamma=0.9, seed=0)
    assert seeded == []


@needs_gpu
def test_on_the_cpu_the_gpus_random_state_stays() -> None:
    torch.cuda.manual_seed(7)
    before = torch.cuda.get_rng_state()
    policy, envs = Swing(), pendulums()
    torch.cuda.set_rng_state(before)
    vine(envs, policy, steps=2, states=3, branches=2, horizon=3, gamma=0.9, seed=0)
    assert torch.equal(torch.cuda.get_rng_state(), before)
