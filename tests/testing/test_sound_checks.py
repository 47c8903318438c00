"""Sound closures that are easily taken for broken ones."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from test_once_missed import ACTIONS, Gaussian, Setting, verdict
from torch import Tensor, nn
from torch.distributions import Categorical, Normal, kl_divergence
from torch.utils.checkpoint import checkpoint

from trpo_optim import mean_kl
from trpo_optim.testing import Verdict, check_closure


class Discrete(nn.Module):
    """A Categorical policy of wide layers, whose last layer may also give a critic's value."""

    def __init__(self, unit: type[nn.Module], seed: int, *, critic: bool) -> None:
        super().__init__()
        torch.manual_seed(seed)
        outputs = ACTIONS + critic
        layers = [nn.Linear(5, 256), unit(), nn.Linear(256, 256), unit(), nn.Linear(256, outputs)]
        self.network = nn.Sequential(*layers)

    def forward(self, x: Tensor) -> Categorical:
        return Categorical(logits=self.network(x)[:, :ACTIONS])


@pytest.mark.parametrize("critic", [False, True])
@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("unit", [nn.ReLU, nn.ReLU6, nn.Hardtanh])
def test_units_that_are_dead_elsewhere_are_no_critic(
    unit: type[nn.Module], seed: int, critic: bool
) -> None:
    policy = Discrete(unit, seed, critic=critic)
    setting = Setting(policy)

    def closure() -> Any:
        dist = policy(setting.seen)
        loss = setting.loss(dist)
        if critic:
            loss = loss + (policy.network(setting.seen)[:, -1] - 1).square().mean()
        return loss, mean_kl(setting.old, dist), dist

    skip = ["values", "deterministic", "zero kl", "moving kl", "kl", "kl scale", "loss slope"]
    report = check_closure(closure, policy.parameters(), skip=skip)
    assert verdict(report, "second order") is (Verdict.UNDECIDED if critic else Verdict.PASSED)


class Again(nn.Linear):
    """A layer that the backward pass evaluates again."""

    def forward(self, x: Tensor) -> Tensor:
        layer = super().forward
        found: Tensor = checkpoint(layer, x.requires_grad_(), use_reentrant=True)
        return found


@pytest.mark.parametrize("third", [False, True])
def test_a_kl_that_is_summed_by_hand_is_no_average(third: bool) -> None:
    policy = Gaussian()
    setting = Setting(policy)

    def closure() -> Any:
        dist = Normal(policy.mean(setting.seen), policy.log_std.exp())
        ratio = (dist.log_prob(setting.actions).sum(-1) - old_log_prob).exp()
        kl = kl_divergence(setting.old.base_dist, dist).sum(-1).mean()
        return (-(ratio * setting.advantages).mean(), kl, dist)[: 2 + third]

    old_log_prob = setting.old.log_prob(setting.actions)
    assert verdict(setting.check(closure, known=False), "kl scale") is Verdict.PASSED


@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad")
def test_a_reentrant_checkpoint_is_sound() -> None:
    policy = Gaussian(Again(5, ACTIONS))
    setting = Setting(policy)

    def closure() -> Any:
        dist = policy(setting.seen)
        return setting.loss(dist), mean_kl(setting.old, dist)

    report = setting.check(closure)
    assert report.passed, str(report)
