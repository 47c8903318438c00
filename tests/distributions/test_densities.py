"""Log-probabilities and entropies that cancel in single precision are those of double precision."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributions as td
from torch import Tensor

from trpo_optim import entropy, frozen, log_prob, sample

LARGE = 1e6

Make = Callable[[Tensor, Tensor], td.Distribution]
"""From two tensors of numbers between 1 and 2 times ``LARGE`` to a distribution."""

CANCELLING: dict[str, Make] = {
    "Beta": lambda a, b: td.Beta(a, b),
    "Beta, rescaled": lambda a, b: td.TransformedDistribution(
        td.Beta(a, b), [td.AffineTransform(-1.0, 2.0)]
    ),
    "Beta, joint": lambda a, b: td.Independent(td.Beta(a.view(-1, 2), b.view(-1, 2)), 1),
    "Binomial": lambda a, b: td.Binomial(int(LARGE), logits=a / LARGE - 1.5),
    "Chi2": lambda a, b: td.Chi2(a),
    "Dirichlet": lambda a, b: td.Dirichlet(torch.stack([a, b, a], -1)),
    "FisherSnedecor": lambda a, b: td.FisherSnedecor(a, b),
    "Gamma": lambda a, b: td.Gamma(a, b),
    "InverseGamma": lambda a, b: td.InverseGamma(a, b),
    "LKJCholesky": lambda a, b: td.LKJCholesky(3, a),
    "LowRankMultivariateNormal": lambda a, b: td.LowRankMultivariateNormal(
        torch.zeros(2).to(a), torch.stack([a, b], -1)[..., None], torch.ones(2).to(a)
    ),
    "mixture of Betas": lambda a, b: td.MixtureSameFamily(
        td.Categorical(logits=(a / LARGE).view(-1, 2)), td.Beta(a.view(-1, 2), a.view(-1, 2))
    ),
    "Multinomial": lambda a, b: td.Multinomial(10**6, torch.stack([a, b, a], -1)),
    "NegativeBinomial": lambda a, b: td.NegativeBinomial(a, logits=b / LARGE - 1.5),
    "Poisson": lambda a, b: td.Poisson(a),
    "StudentT": lambda a, b: td.StudentT(a, b / LARGE, 1.0),
    "VonMises": lambda a, b: td.VonMises(0 * a, a),
    "Wishart": lambda a, b: td.Wishart(a, scale_tril=torch.eye(2).to(a).expand(len(a), 2, 2)),
}


def pair(make: Make, dtype: torch.dtype) -> td.Distribution:
    draws = torch.rand(2, 64, generator=torch.Generator().manual_seed(0))
    return make(*(LARGE * (1 + draws)).to(dtype))


@pytest.mark.filterwarnings("ignore:Singular sample")  # torch's test of draws from a Wishart
@pytest.mark.parametrize("family", CANCELLING)
def test_log_probabilities_in_single_precision_are_those_of_double(family: str) -> None:
    torch.manual_seed(0)
    coarse, fine = (pair(CANCELLING[family], dtype) for dtype in (torch.float32, torch.float64))
    actions = sample(fine)
    actions = actions.float() if actions.is_floating_point() else actions
    finer = frozen(fine)
    for part in (finer, getattr(finer, "base_dist", finer)):
        part._validate_args = False  # rows of length 1 in single precision
    found, exact = log_prob(coarse, actions), finer.log_prob(actions.double())
    assert found.dtype is torch.float32
    torch.testing.assert_close(found.double(), exact, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("family", ["Beta", "Dirichlet", "Gamma", "StudentT", "Wishart"])
def test_entropies_in_single_precision_are_those_of_double(family: str) -> None:
    coarse, fine = (pair(CANCELLING[family], dtype) for dtype in (torch.float32, torch.float64))
    found = entropy(coarse)
    assert found.dtype is torch.float32
    torch.testing.assert_close(found.double(), fine.entropy(), rtol=1e-6, atol=1e-6)


BY_SCIPY: dict[str, tuple[Make, Callable[..., Any]]] = {
    "Beta": (CANCELLING["Beta"], lambda stats, x, a, b: stats.beta.logpdf(x, a, b)),
    "Gamma": (CANCELLING["Gamma"], lambda stats, x, a, b: stats.gamma.logpdf(x, a, scale=1 / b)),
    "Poisson": (CANCELLING["Poisson"], lambda stats, x, a, b: stats.poisson.logpmf(x, a)),
    "StudentT": (CANCELLING["StudentT"], lambda stats, x, a, b: stats.t.logpdf(x, a, b / LARGE)),
    "VonMises": (CANCELLING["VonMises"], lambda stats, x, a, b: stats.vonmises.logpdf(x, a)),
}


@pytest.mark.parametrize("family", BY_SCIPY)
def test_log_probabilities_of_large_parameters_are_those_of_scipy(family: str) -> None:
    stats = pytest.importorskip("scipy.stats")
    torch.manual_seed(0)
    make, exact = BY_SCIPY[family]
    draws = torch.rand(2, 64, generator=torch.Generator().manual_seed(0))
    dist = make(*(LARGE * (1 + draws)))
    actions = sample(pair(make, torch.float64)).float()
    arrays = (np.asarray(each, float) for each in (actions, *(LARGE * (1 + draws))))
    expected = exact(stats, *arrays)
    np.testing.assert_allclose(log_prob(dist, actions), expected, rtol=1e-5, atol=1e-4)


def test_the_ratio_and_its_slope_do_not_cancel() -> None:
    torch.manual_seed(0)
    first, second = (1e7 * (1 + torch.rand(64))).requires_grad_(), 1e7 * (1 + torch.rand(64))
    action = sample(td.Beta(first.detach().double(), second.double())).float()
    ratio = (log_prob(td.Beta(first, second), action) - _beta(first, second, action)).exp()
    torch.testing.assert_close(ratio, torch.ones(64), rtol=0.0, atol=1e-5)
    (slope,) = torch.autograd.grad(log_prob(td.Beta(first, second), action).sum(), first)
    wide = first.double().detach().requires_grad_()
    (exact,) = torch.autograd.grad(
        td.Beta(wide, second.double()).log_prob(action.double()).sum(), wide
    )
    torch.testing.assert_close(slope.double(), exact, rtol=1e-5, atol=1e-12)


def _beta(first: Tensor, second: Tensor, action: Tensor) -> Tensor:
    """Return log-probabilities by the standard library's lgamma."""
    logs = [
        math.lgamma(a + b)
        - math.lgamma(a)
        - math.lgamma(b)
        + (a - 1) * math.log(x)
        + (b - 1) * math.log1p(-x)
        for a, b, x in zip(first.tolist(), second.tolist(), action.tolist(), strict=True)
    ]
    return torch.tensor(logs)


def test_a_binomial_does_not_depend_on_what_was_read_before() -> None:
    dist = td.Binomial(10**7, torch.tensor([0.3, 0.7]))
    action = torch.tensor([3.001e6, 7.002e6])
    before = log_prob(dist, action)
    dist.logits  # noqa: B018 (derived from the probabilities in single precision)
    assert torch.equal(log_prob(dist, action), before)


def test_what_a_distribution_keeps_in_double_precision_changes_no_precision() -> None:
    dist = td.VonMises(torch.zeros(3), torch.full((3,), 2.0))
    action = dist.sample()  # from numbers in double precision, which it keeps
    assert log_prob(dist, action).dtype is torch.float32


def test_the_support_is_that_in_the_precision_of_the_action() -> None:
    scaled = td.TransformedDistribution(
        td.Beta(torch.tensor(1.0), torch.tensor(1.0)), [td.AffineTransform(0.1, 0.1)]
    )
    edge = torch.tensor(0.2)  # is more than 0.2 in double precision
    assert float(log_prob(scaled, edge)) == pytest.approx(math.log(10), rel=1e-5)
    with pytest.raises(ValueError, match="support"):
        log_prob(td.Beta(torch.tensor(2.0), torch.tensor(2.0)), torch.tensor(1.5))
    unchecked = td.Beta(torch.tensor(2.0), torch.tensor(2.0), validate_args=False)
    assert log_prob(unchecked, torch.tensor(1.5)).isnan()


class Mixing(td.Transform):
    """A transform with a matrix of its own precision."""

    domain = codomain = td.constraints.real_vector
    bijective = True

    def __init__(self) -> None:
        super().__init__()
        self.matrix = torch.tensor([[2.0, 1.0], [0.0, 0.5]])

    def _call(self, x: Tensor) -> Tensor:
        return x @ self.matrix

    def _inverse(self, y: Tensor) -> Tensor:
        return y @ self.matrix.inverse()

    def log_abs_det_jacobian(self, x: Tensor, y: Tensor) -> Tensor:
        """Return zero: the determinant of the matrix is 1."""
        return x.new_zeros(x.shape[:-1])


def test_a_flow_of_heavy_tails_keeps_its_precision() -> None:
    base = td.Independent(td.StudentT(torch.full((2,), 4.0)), 1)
    flow = td.TransformedDistribution(base, [Mixing()])
    action = torch.tensor([0.3, -0.2])
    expected = flow.log_prob(action)
    torch.testing.assert_close(log_prob(flow, action), expected)
