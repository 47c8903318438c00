"""Actions that rounding takes to the edge of the support are no fault of a policy."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.distributions as td
from test_kit_rounding import policy_report
from torch import Tensor, nn
from torch.distributions import Distribution, Independent, Normal, TanhTransform
from torch.nn.functional import softplus

from trpo_optim.testing import PolicyReport, Verdict

pytestmark = pytest.mark.no_cover

Family = Callable[[Tensor, Tensor], Distribution]


class Edged(nn.Module):
    """A small network, and a distribution of its six outputs and three free parameters."""

    def __init__(self, family: Family) -> None:
        super().__init__()
        self.network = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 6))
        self.free, self.family = nn.Parameter(torch.zeros(3)), family

    def forward(self, observations: Tensor) -> Distribution:
        return self.family(self.network(observations), self.free)


def squashed_flow(x: Tensor, free: Tensor) -> Distribution:
    base = Independent(Normal(torch.zeros_like(x[:, :3]), 1.0), 1)
    learned = td.AffineTransform(x[:, :3], free.exp(), event_dim=1)
    return td.TransformedDistribution(base, [learned, TanhTransform()])


def wide_squashed(x: Tensor, free: Tensor) -> Distribution:
    normal = Independent(Normal(5 * x[:, :3], free.exp()), 1)
    return td.TransformedDistribution(normal, [TanhTransform(cache_size=1)])


def beta(x: Tensor, free: Tensor) -> Distribution:
    return Independent(td.Beta(0.3 * softplus(x[:, :3]), 0.3 * softplus(x[:, 3:])), 1)


SOUND: dict[str, Family] = {
    "squashed flow": squashed_flow,
    "wide, squashed": wide_squashed,
    "Kumaraswamy": lambda x, _: Independent(
        td.Kumaraswamy(softplus(x[:, :3]) + 0.5, softplus(x[:, 3:]) + 0.5), 1
    ),
    "Beta of small concentrations": beta,
    "Dirichlet of small concentrations": lambda x, _: td.Dirichlet(0.2 * softplus(x)),
    "relaxed one-hot": lambda x, _: td.RelaxedOneHotCategorical(
        torch.tensor(0.5, dtype=x.dtype), logits=x[:, :3]
    ),
}


def report_of(family: Family, seed: int, dtype: torch.dtype, *, whole: bool) -> PolicyReport:
    torch.manual_seed(seed)
    policy = Edged(family).to(dtype)
    observations = torch.randn(256, 4).to(dtype)
    return policy_report(policy, observations, whole=whole)


@pytest.mark.parametrize("whole", [True, False], ids=["a module", "a function"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("family", SOUND)
@pytest.mark.parametrize(
    "seed", [1, *(pytest.param(seed, marks=pytest.mark.thorough) for seed in (2, 3))]
)
def test_no_false_alarm_at_the_edge_of_the_support(
    family: str, dtype: torch.dtype, seed: int, whole: bool
) -> None:
    report = report_of(SOUND[family], seed, dtype, whole=whole)
    assert report.passed, str(report)


def test_an_estimated_kl_of_squashed_actions_is_compared() -> None:
    report = report_of(squashed_flow, 1, torch.float64, whole=True)
    for check in ("density", "sampler", "kl", "fisher", "step"):
        assert report[check].verdict is Verdict.PASSED, str(report)


def test_what_rounding_hides_is_told() -> None:
    report = report_of(beta, 1, torch.float32, whole=True)
    for check in ("density", "sampler", "entropy", "kl"):
        assert report[check].verdict is Verdict.UNDECIDED
        assert "Rounding hides log_prob of" in report[check].cause


def moved_edge(x: Tensor, free: Tensor) -> Distribution:
    base = Independent(td.Exponential(torch.ones_like(x[:, :3])), 1)
    learned = td.AffineTransform(x[:, :3], free.exp(), event_dim=1)
    return td.TransformedDistribution(base, [learned], validate_args=False)


class Unscaled(td.Beta):
    """A Beta whose log_prob is half of what it should be."""

    def log_prob(self, value: Tensor) -> Tensor:
        halved: Tensor = super().log_prob(value) / 2  # type: ignore[no-untyped-call]  # torch's
        return halved


@pytest.mark.parametrize(
    ("family", "check"),
    [
        (moved_edge, "kl"),
        (lambda x, _: Independent(Unscaled(softplus(x[:, :3]), softplus(x[:, 3:])), 1), "density"),
    ],
    ids=["moving support", "wrong density"],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_faults_near_the_edge_are_found(family: Family, check: str, dtype: torch.dtype) -> None:
    report = report_of(family, 0, dtype, whole=True)
    assert report[check].verdict is Verdict.FAILED, str(report)
