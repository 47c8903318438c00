"""KLs are exact in every precision, or refused where the precision cannot resolve them."""

from __future__ import annotations

import copy
import random
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributions as td
from profiles import problems
from torch import Tensor, nn
from torch.distributions import Distribution, Independent, kl_divergence

from trpo_optim import (
    TrustRegionError,
    TrustRegionOptimizer,
    frozen,
    joint_kl,
    log_prob,
    mean_kl,
    sample,
)

HALF = [torch.float16, torch.bfloat16]


class Policy(nn.Module):
    """A small policy of one of two families."""

    def __init__(self, actions: int, family: str) -> None:
        super().__init__()
        self.network = nn.Sequential(nn.Linear(8, 32), nn.Tanh(), nn.Linear(32, actions))
        self.log_std = nn.Parameter(torch.full((actions,), -0.5))
        self.family = family

    def forward(self, observations: Tensor) -> Distribution:
        outputs = self.network(observations)
        if self.family == "categorical":
            return td.Categorical(logits=outputs + 0 * self.log_std)
        return Independent(td.Normal(outputs, self.log_std.exp()), 1)


@pytest.mark.parametrize("family", ["normal", "categorical"])
@pytest.mark.parametrize("dtype", HALF)
def test_in_half_precision_the_true_kl_is_within_the_radius(
    dtype: torch.dtype, family: str
) -> None:
    for seed in range(problems(share=0.25)):
        torch.manual_seed(seed)
        draw = random.Random(seed)
        policy = Policy(draw.randint(1, 30), family).to(dtype)
        max_kl = 10 ** draw.uniform(-4, -1)
        observations, advantages = torch.randn(256, 8).to(dtype), torch.randn(256)
        old, before = frozen(policy(observations)), copy.deepcopy(policy).double()
        actions = sample(old)
        old_log_prob = log_prob(old, actions).detach()

        def closure(
            policy: Any = policy,
            rows: Any = (observations, advantages, old, actions, old_log_prob),
        ) -> Any:
            observations, advantages, old, actions, old_log_prob = rows
            new = policy(observations)
            ratio = (log_prob(new, actions) - old_log_prob).exp()
            return -(ratio * advantages).mean(), mean_kl(old, new), new

        report = TrustRegionOptimizer(policy.parameters(), max_kl=max_kl).step(closure)
        assert report.engine == "Gauss-Newton"
        after = copy.deepcopy(policy).double()
        with torch.no_grad():
            wide = observations.double()
            kl = kl_divergence(before(wide), after(wide)).mean().item()
        assert kl <= 1.05 * max_kl


@pytest.mark.parametrize("dtype", HALF)
def test_a_kl_computed_in_half_precision_is_refused(dtype: torch.dtype) -> None:
    policy = Policy(17, "normal").to(dtype)
    observations = torch.randn(64, 8).to(dtype)
    with torch.no_grad():
        old = policy(observations)

    def closure() -> Any:
        new = policy(observations)
        return new.base_dist.loc.mean(), kl_divergence(old, new).mean()

    with pytest.raises(TrustRegionError, match=r"max_kl is 0.01, but.*resolves.*mean_kl\(\)"):
        TrustRegionOptimizer(policy.parameters(), max_kl=0.01).step(closure)


def test_a_radius_below_what_single_precision_resolves_is_refused() -> None:
    policy = Policy(3, "normal")
    observations = torch.randn(64, 8)
    old = frozen(policy(observations))

    def closure() -> Any:
        new = policy(observations)
        return new.log_prob(torch.ones(3)).mean(), mean_kl(old, new)

    with pytest.raises(TrustRegionError, match=r"max_kl is 1e-08, but.*1e-06 nats"):
        TrustRegionOptimizer(policy.parameters(), max_kl=1e-8).step(closure)


CANCELLING: dict[type[Any], Callable[[Tensor, Tensor], tuple[Tensor, ...]]] = {
    td.Beta: lambda a, b: (a, b),
    td.Gamma: lambda a, b: (a, b),
    td.Chi2: lambda a, b: (a,),
    td.Poisson: lambda a, b: (a,),
    td.Dirichlet: lambda a, b: (torch.stack([a, b, a], -1),),
    td.LowRankMultivariateNormal: lambda a, b: (
        torch.stack([a, b], -1) / 1e6,
        torch.stack([b, a], -1)[..., None] / 1e6,
        torch.stack([a, a], -1) / 1e9,
    ),
}
"""How their parameters are made of large numbers."""


@pytest.mark.parametrize("family", CANCELLING)
def test_large_parameters_in_single_precision_have_the_kl_of_double_precision(family: Any) -> None:
    torch.manual_seed(0)
    large = 1e5 * (1 + torch.rand(64))
    near = large * (1 + 1e-3 * torch.randn(64))
    old = CANCELLING[family](large, near)
    for new in (CANCELLING[family](near, near), tuple(each.clone() for each in old)):
        double = [family(*(each.double() for each in parameters)) for parameters in (old, new)]
        kl = joint_kl(family(*old), family(*new))
        torch.testing.assert_close(kl, kl_divergence(*double), rtol=1e-9, atol=1e-9)
