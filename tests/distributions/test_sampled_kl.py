"""The KL estimated on the actions: without bias, with the curvature of the score."""

from __future__ import annotations

import math

import pytest
import torch
import torch.distributions as td
from networks import SAMPLES
from pairs import mixture
from torch import Tensor, nn
from torch.distributions import kl_divergence

from trpo_optim import (
    TrustRegionOptimizer,
    mean_kl,
    sampled_kl,
)


def test_a_ratio_that_overflows_leaves_the_plain_sampled_kl_a_number() -> None:
    assert sampled_kl(torch.tensor([-100.0, 0.0]), torch.tensor([0.0, -1.0])).item() == -49.5


def test_the_sampled_kls_are_without_bias_and_one_is_never_negative() -> None:
    torch.manual_seed(0)
    old = td.Normal(torch.zeros(2_000_000), 1.0)
    new = td.Normal(torch.full((2_000_000,), 0.1), 1.1)
    actions = old.sample()
    ours = [old.log_prob(actions), new.log_prob(actions)]
    exact = kl_divergence(old, new).mean().item()
    ratios = ours[1] - ours[0]
    for low_variance, each in ((False, -ratios), (True, ratios.exp() - 1 - ratios)):
        estimate = sampled_kl(*ours, low_variance=low_variance).item()
        assert estimate == pytest.approx(exact, abs=4 * each.std().item() / math.sqrt(2e6))
    few = [each[:30].view(10, 3) for each in ours]
    plain = [sampled_kl(a, b).item() for a, b in zip(*few, strict=True)]
    other = [sampled_kl(a, b, low_variance=True).item() for a, b in zip(*few, strict=True)]
    assert min(plain) < 0 < min(other)


def test_the_low_variance_estimator_has_a_tenth_of_the_plain_ones_deviation() -> None:
    torch.manual_seed(0)
    old = td.Independent(td.Normal(torch.zeros(200, 2048, 6), 1.0), 1)
    new = td.Independent(td.Normal(torch.full((200, 2048, 6), (0.02 / 6) ** 0.5), 1.0), 1)
    assert mean_kl(old, new).item() == pytest.approx(0.01)
    actions = old.sample()
    logs = list(zip(old.log_prob(actions), new.log_prob(actions), strict=True))
    plain = torch.stack([sampled_kl(*each) for each in logs]).std().item()
    other = torch.stack([sampled_kl(*each, low_variance=True) for each in logs]).std().item()
    assert plain == pytest.approx((2 * 0.01 / 2048) ** 0.5, rel=0.2)
    assert other / plain == pytest.approx(0.1, abs=0.03)


@pytest.mark.parametrize("low_variance", [False, True])
def test_the_sampled_kl_curves_as_the_score_does(low_variance: bool) -> None:
    torch.manual_seed(0)
    x = torch.randn(SAMPLES, 4, dtype=torch.float64)
    with torch.no_grad():
        actions = mixture(x).sample()
        old = mixture(x).log_prob(actions)

    def kl(y: Tensor) -> Tensor:
        new = mixture(y).log_prob(actions)
        return sampled_kl(old, new, low_variance=low_variance)

    scores = torch.autograd.functional.jacobian(lambda y: mixture(y).log_prob(actions), x)
    flat = scores.reshape(SAMPLES, -1)
    hessian = torch.autograd.functional.hessian(kl, x).reshape(4 * SAMPLES, -1)
    torch.testing.assert_close(hessian, flat.T @ flat / SAMPLES)
    torch.testing.assert_close(
        torch.autograd.functional.jacobian(kl, x), torch.zeros_like(x), rtol=0, atol=1e-16
    )


def test_a_mask_leaves_padding_out_of_the_sampled_kl() -> None:
    old, new = torch.tensor([0.1, -math.inf, 0.3]), torch.tensor([0.2, -math.inf, 0.1])
    new.requires_grad_()
    mask = torch.tensor([True, False, True])
    value = sampled_kl(old, new, mask)
    assert value.item() == pytest.approx(0.05)
    (slope,) = torch.autograd.grad(value, new)
    torch.testing.assert_close(slope, (torch.tensor([0.1, 0.0, -0.2]).exp() - 1) / 2)


def test_a_step_on_the_plain_sampled_kl_stays_within_the_radius_that_it_measures() -> None:
    torch.manual_seed(0)
    layer = nn.Linear(3, 4)
    observations = torch.randn(2000, 3)
    with torch.no_grad():
        actions = mixture(layer(observations)).sample()
        old = mixture(layer(observations)).log_prob(actions)
    advantages = torch.randn(2000)

    def closure() -> tuple[Tensor, Tensor, Tensor]:
        new = mixture(layer(observations)).log_prob(actions)
        return -((new - old).exp() * advantages).mean(), sampled_kl(old, new), new

    report = TrustRegionOptimizer(layer.parameters()).step(closure)
    assert (report.accepted, report.engine) == (True, "Gauss-Newton")
    assert report.kl <= 0.01
    with torch.no_grad():
        new = mixture(layer(observations)).log_prob(actions)
    assert (old - new).mean().item() == pytest.approx(report.kl, rel=1e-4)
