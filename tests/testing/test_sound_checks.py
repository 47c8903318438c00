"""Sound closures that are easily taken for broken ones."""

from __future__ import annotations

from typing import Any

import pytest
from test_once_missed import ACTIONS, Gaussian, Setting, verdict
from torch import Tensor, nn
from torch.distributions import Normal, kl_divergence
from torch.utils.checkpoint import checkpoint

from trpo_optim import mean_kl
from trpo_optim.testing import Verdict


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
