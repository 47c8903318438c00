"""KLs that torch's closed forms lose to rounding, beside those in double precision."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor
from torch.autograd.functional import hessian
from torch.distributions import (
    Bernoulli,
    Categorical,
    Cauchy,
    ContinuousBernoulli,
    Exponential,
    Geometric,
    Gumbel,
    Independent,
    MultivariateNormal,
    Normal,
    Poisson,
    kl_divergence,
)

from trpo_optim import joint_kl

LOGITS = [-12.0, -6.0, -0.3, 0.0, 0.02, 5.0, 12.0]


@pytest.mark.parametrize("logit", LOGITS)
def test_the_kl_of_a_continuous_bernoulli_does_not_cancel(logit: float) -> None:
    given = torch.tensor(logit)
    found = joint_kl(ContinuousBernoulli(logits=given), ContinuousBernoulli(logits=given + 0.3))
    a, b = given.double(), given.double() + 0.3

    def log_norm(eta: Tensor) -> Tensor:  # of exp(ηx) on [0, 1]
        x = (torch.arange(400_000, dtype=torch.float64) + 0.5) / 400_000
        return (eta * x).exp().mean().log()

    x = (torch.arange(400_000, dtype=torch.float64) + 0.5) / 400_000
    mean = ((a * x - log_norm(a)).exp() * x).mean()
    expected = log_norm(b) - log_norm(a) - mean * 0.3
    assert float(found) == pytest.approx(float(expected), rel=2e-4)


@pytest.mark.parametrize("chance", [0.3, 1e-3, 1e-5, 1e-7, 0.999])
def test_the_kl_of_a_geometric_does_not_cancel(chance: float) -> None:
    other = chance * 0.9
    one, two = torch.tensor(chance), torch.tensor(other)
    found, p, q = joint_kl(Geometric(one), Geometric(two)), float(one), float(two)
    expected = math.log(p / q) + (1 - p) / p * (math.log1p(-p) - math.log1p(-q))
    assert float(found) == pytest.approx(expected, rel=1e-4)
    one, two = (each.double().logit().float() for each in (one, two))
    found = joint_kl(Geometric(logits=one), Geometric(logits=two))
    assert float(found) == pytest.approx(expected, rel=2e-3)


@pytest.mark.parametrize("chance", [1e-7, 1e-9, 0.5, 1 - 2**-20])
def test_the_kl_of_a_bernoulli_is_exact_at_the_edges(chance: float) -> None:
    one, other = torch.tensor(chance), torch.tensor(chance) * 0.9
    found = joint_kl(Bernoulli(one), Bernoulli(other))
    p, q = float(one), float(other)
    expected = p * math.log(p / q) + (1 - p) * (math.log1p(-p) - math.log1p(-q))
    assert float(found) == pytest.approx(expected, rel=1e-4)


def test_a_poisson_that_counts_nothing_has_a_kl() -> None:
    rates = torch.tensor([0.0, 2.0])
    found = joint_kl(Poisson(rates), Poisson(torch.tensor([0.5, 3.0])))
    torch.testing.assert_close(found, torch.tensor([0.5, 2 * math.log(2 / 3) + 1]).double())
    assert not joint_kl(Poisson(rates), Poisson(rates.clone())).any()


@pytest.mark.parametrize("dimensions", [17, 100, 400])
@pytest.mark.parametrize("move", [1e-2, 1e-4])
def test_the_kl_of_many_dimensions_is_right_in_single_precision(
    dimensions: int, move: float
) -> None:
    torch.manual_seed(0)
    loc, log_std = torch.randn(2, 256, dimensions)
    new_loc, new_log_std = (each + move * torch.randn(256, dimensions) for each in (loc, log_std))

    def kl(*given: Tensor) -> Tensor:
        old, new = (Independent(Normal(given[i], given[i + 1].exp()), 1) for i in (0, 2))
        return joint_kl(old, new)

    found = kl(loc, log_std, new_loc, new_log_std)
    exact = kl(*(each.double() for each in (loc, log_std, new_loc, new_log_std)))
    assert float(found.mean()) == pytest.approx(float(exact.mean()), rel=1e-2)


@pytest.mark.parametrize("ratio", [1e-20, 1e-4, 1e-3, 0.6, 1.4, 1e3, 1e8])
def test_the_kl_of_normals_of_any_widths_and_its_slope(ratio: float) -> None:
    scale = torch.tensor(1.0, requires_grad=True)
    kl = joint_kl(Normal(0.0, torch.tensor(ratio)), Normal(torch.tensor(0.0), scale))
    (slope,) = torch.autograd.grad(kl, scale)
    expected = 0.5 * (ratio**2 - 1) - math.log(ratio)
    assert float(kl.detach()) == pytest.approx(expected, rel=1e-5)
    assert float(slope) == pytest.approx(1 - ratio**2, rel=1e-5)


def test_the_kl_of_a_geometric_does_not_depend_on_what_was_read_before() -> None:
    old, new = (Geometric(logits=torch.tensor(each)) for each in (17.0, 16.0))
    before = joint_kl(old, new)
    for each in (old, new):
        each.log_prob(torch.tensor(1.0))
    assert joint_kl(old, new) == before


@pytest.mark.parametrize("dimensions", [3, 32, 128])
@pytest.mark.parametrize("kl", [1e-2, 1e-4])
@pytest.mark.parametrize("width", [1e-12, 1e-2, 1e12])
def test_the_kl_of_a_multivariate_normal_is_right_in_single_precision(
    dimensions: int, kl: float, width: float
) -> None:
    torch.manual_seed(0)
    lower = torch.randn(16, dimensions, dimensions).tril(-1) / dimensions
    root = width * (lower + torch.diag_embed(torch.randn(16, dimensions).exp()))
    loc, move = 10 * width * torch.randn(16, dimensions), (kl / dimensions) ** 0.5
    new_root = root * (1 + move * torch.randn_like(root))
    new_loc = loc + move * (root @ torch.randn(16, dimensions, 1)).squeeze(-1)

    def normal(mean: Tensor, factor: Tensor, dtype: torch.dtype) -> MultivariateNormal:
        return MultivariateNormal(mean.to(dtype), scale_tril=factor.to(dtype))

    found, exact = (
        kl_of(normal(loc, root, dtype), normal(new_loc, new_root, dtype))
        for kl_of, dtype in ((joint_kl, torch.float32), (kl_divergence, torch.float64))
    )
    torch.testing.assert_close(found.double(), exact, rtol=2e-3, atol=0.0)


def test_multivariate_normals_may_share_a_scale_or_be_far_apart() -> None:
    torch.manual_seed(0)
    one, two = (torch.eye(3) * width + torch.rand(3, 3).tril(-1) for width in (1e-4, 1e4))
    loc, every = torch.randn(2, 5, 3), torch.ones(2, 5, dtype=torch.bool)
    for ours, theirs in [(one, two), (two, one), (one, two.expand(2, 5, 3, 3)), (two, two.clone())]:
        old = MultivariateNormal(loc, scale_tril=ours)
        new = MultivariateNormal(-loc, scale_tril=theirs)
        wide = [
            MultivariateNormal(each.loc.double(), scale_tril=each.scale_tril.double())
            for each in (old, new)
        ]
        found, exact = joint_kl(old, new, mask=every), kl_divergence(*wide).flatten()
        torch.testing.assert_close(found.double(), exact, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("kl", [1e-2, 1e-4])
@pytest.mark.parametrize("distance", [1.0, 1e4, 1e6])
@pytest.mark.parametrize("width", [1e-12, 1.0, 1e12])
def test_the_kl_of_gumbels_far_from_zero(distance: float, width: float, kl: float) -> None:
    torch.manual_seed(0)
    scale = width * (0.5 + torch.rand(256))
    loc = distance * width * (1 + torch.rand(256))
    new_loc = loc + (2 * kl) ** 0.5 * scale * torch.randn(256)
    new_scale = scale * (1 + (2 * kl) ** 0.5 * torch.randn(256))
    found = joint_kl(Gumbel(loc, scale), Gumbel(new_loc, new_scale))
    ratio, shift = ((a.double() / b.double()) for a, b in ((scale, new_scale), (loc, new_scale)))
    shift -= new_loc.double() / new_scale.double()
    euler = 0.5772156649015329
    mean_of_exp = (torch.lgamma(1 + ratio) - shift).exp()
    expected = shift - ratio.log() + euler * (ratio - 1) + mean_of_exp - 1
    torch.testing.assert_close(found.double(), expected, rtol=1e-4, atol=1e-9)


@pytest.mark.parametrize("kl", [1e-2, 1e-4])
def test_the_kl_of_many_exponentials_is_right_in_single_precision(kl: float) -> None:
    torch.manual_seed(0)
    rate = 0.3 + torch.rand(400)
    new_rate = rate * (1 + (2 * kl / 400) ** 0.5 * torch.randn(400))
    old, new = (Independent(Exponential(each), 1) for each in (rate, new_rate))
    exact = kl_divergence(*(Exponential(each.double()) for each in (rate, new_rate))).sum()
    assert float(joint_kl(old, new)) == pytest.approx(float(exact), rel=1e-4)


@pytest.mark.parametrize("ratio", [1e-20, 1e-4, 0.6, 1.4, 1e4, 1e20])
def test_the_kl_of_exponentials_of_any_rates_and_its_slope(ratio: float) -> None:
    rate = torch.tensor(ratio, requires_grad=True)
    kl = joint_kl(Exponential(torch.tensor(1.0)), Exponential(rate))
    (slope,) = torch.autograd.grad(kl, rate)
    assert float(kl.detach()) == pytest.approx(ratio - 1 - math.log(ratio), rel=1e-5)
    assert float(slope) == pytest.approx(1 - 1 / ratio, rel=1e-5)


@pytest.mark.parametrize("kl", [1e-2, 1e-4])
@pytest.mark.parametrize("width", [1e-18, 1e-12, 1.0, 1e12, 1e25])
def test_the_kl_of_cauchys_of_any_width_and_its_curvature(width: float, kl: float) -> None:
    torch.manual_seed(0)
    scale = 0.5 + torch.rand(400)
    loc, move = torch.randn(400), (4 * kl / 400) ** 0.5
    raw = torch.stack(
        [loc + move * scale * torch.randn(400), scale * (1 + move * torch.randn(400))]
    )
    (loc, scale), given = width * torch.stack([loc, scale]), (width * raw)
    double = [Cauchy(*pair.double()) for pair in (torch.stack([loc, scale]), given)]
    old, new = (Independent(Cauchy(*pair), 1) for pair in ((loc, scale), given))
    assert float(joint_kl(old, new)) == pytest.approx(float(_cauchy_kl(*double)), rel=1e-4)

    def kl_from(free: Tensor) -> Tensor:
        return joint_kl(Cauchy(loc[0], scale[0]), Cauchy(width * free[0], width * free[1]))

    curvature = hessian(kl_from, torch.stack([loc, scale])[:, 0] / width)
    expected = torch.eye(2) / (2 * (scale[0] / width) ** 2)  # the Fisher matrix
    torch.testing.assert_close(curvature, expected, rtol=1e-4, atol=1e-6)


def _cauchy_kl(old: Cauchy, new: Cauchy) -> Tensor:
    """Return the closed form in double precision, which has no squares that are out of range."""
    squares = (old.scale + new.scale).square() + (old.loc - new.loc).square()
    return (squares.log() - (4 * old.scale * new.scale).log()).sum()


@pytest.mark.parametrize("ratio", [1e-15, 1e-4, 0.6, 1.4, 1e4, 1e15])
def test_the_kl_of_cauchys_of_any_widths(ratio: float) -> None:
    kl = joint_kl(Cauchy(0.0, torch.tensor(1.0)), Cauchy(0.0, torch.tensor(ratio)))
    assert float(kl) == pytest.approx(2 * math.log1p(ratio) - math.log(4 * ratio), rel=1e-5)


@pytest.mark.parametrize("gap", [20.0, 88.0, 95.0, 103.0, 200.0])
def test_the_kl_of_a_softmax_has_the_fisher_matrix_where_a_probability_is_denormal(
    gap: float,
) -> None:
    logits = torch.tensor([0.3, -0.2, -gap])
    old = Categorical(probs=logits.softmax(-1))
    curvature = hessian(lambda z: joint_kl(old, Categorical(probs=z.softmax(-1))), logits)
    fisher = torch.diag(old.probs) - torch.outer(old.probs, old.probs)
    torch.testing.assert_close(curvature, fisher, rtol=1e-5, atol=1e-7)
    other = Categorical(probs=torch.tensor([0.5, 0.4, -gap]).softmax(-1))
    a, b = (each.probs.double() for each in (old, other))
    a, b = a[:2], b[:2]  # the third adds less than 1e-7
    assert float(joint_kl(old, other)) == pytest.approx(float((a * (a / b).log()).sum()), rel=1e-5)


@pytest.mark.parametrize("gap", [20.0, 95.0, 200.0])
def test_the_kl_of_a_sigmoid_has_the_fisher_matrix_where_a_probability_is_denormal(
    gap: float,
) -> None:
    logit = torch.tensor(-gap)
    old = Bernoulli(probs=logit.sigmoid())
    curvature = hessian(lambda z: joint_kl(old, Bernoulli(probs=z.sigmoid())), logit)
    torch.testing.assert_close(curvature, old.probs * (1 - old.probs), rtol=1e-5, atol=1e-7)
