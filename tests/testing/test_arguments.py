"""What distributions are made of is found to be raw, squashed or clamped away, in any family."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributions as td
from sound_policies import OBSERVATIONS, ROWS, Made, joint
from torch import Tensor, nn
from torch.distributions import Categorical, Normal
from torch.nn.functional import softplus

from trpo_optim import frozen, mean_kl
from trpo_optim.testing import POLICY_CHECKS, Finding, Verdict, check_closure, check_policy

pytestmark = pytest.mark.no_cover

Make = Callable[[Tensor, Tensor, Tensor], Any]

RAW: dict[str, tuple[str, Make]] = {
    "a free scale": ("scale", lambda x, free, _: joint(Normal(x[:, :2], 1 + free))),
    "a free scale within a transform": (
        "scale",
        lambda x, free, _: td.TransformedDistribution(
            joint(Normal(x[:, :2], 1 + free)), [td.TanhTransform()]
        ),
    ),
    "one part's scale": (
        "scale",
        lambda x, free, _: {
            "button": Categorical(logits=x),
            "stick": joint(Normal(x[:, :2], 1 + free)),
        },
    ),
    "a mixture's scale": (
        "scale",
        lambda x, free, _: td.MixtureSameFamily(
            Categorical(logits=x[:, :2]), Normal(x[:, 2:], 1 + free)
        ),
    ),
    "a Gamma's concentration": (
        "concentration",
        lambda x, *_: joint(td.Gamma(3 + x[:, :2], 0.3 + softplus(x[:, 2:]))),
    ),
    "a rate": ("rate", lambda x, *_: joint(td.Poisson(3 + x))),
    "a coin's probability": ("probs", lambda x, *_: joint(td.Bernoulli(probs=0.5 + 0.1 * x))),
    "a triangular factor": (
        "scale_tril",
        lambda x, free, _: td.MultivariateNormal(
            x[:, :2], scale_tril=torch.diag_embed(1 + free).expand(len(x), 2, 2)
        ),
    ),
}

SQUASHED: dict[str, Make] = {
    "a softmax": lambda x, *_: Categorical(logits=x.softmax(-1)),
    "a masked softmax": lambda x, *_: Categorical(
        logits=x.softmax(-1).masked_fill(torch.arange(4) == 2, -torch.inf)
    ),
    "a softmax that is kept from zero": lambda x, *_: Categorical(
        logits=x.softmax(-1).clamp(1e-6, 1)
    ),
    "a softmax of tokens": lambda x, *_: Categorical(logits=x.view(-1, 2, 2).softmax(-1)),
    "a softmax of one part": lambda x, *_: (
        Categorical(logits=x[:, :2]),
        Categorical(logits=x[:, 2:].softmax(-1)),
    ),
    "one-hot": lambda x, *_: td.OneHotCategorical(logits=x.softmax(-1)),
    "sigmoids": lambda x, *_: joint(td.Bernoulli(logits=x.sigmoid())),
}

CLAMPED: dict[str, Make] = {
    "both sides": lambda x, free, _: joint(Normal(x[:, :2], (free + 3).clamp(-5, 2).exp())),
    "from below": lambda x, free, _: joint(Normal(x[:, :2], (free - 3).clamp(min=1e-3))),
    "from above": lambda x, free, _: joint(Normal(x[:, :2], (free + 3).clamp(max=2).exp())),
    "by a minimum": lambda x, free, _: joint(
        Normal(x[:, :2], torch.minimum(free + 3, torch.tensor(2.0).to(free)).exp())
    ),
    "by a maximum": lambda x, free, _: joint(
        Normal(x[:, :2], torch.maximum(torch.tensor(1e-3).to(free), free - 3))
    ),
    "one number": lambda x, free, _: joint(Normal(x[:, :2], (free[0] + 3).clamp(-5, 2).exp())),
    "an output": lambda x, *_: joint(Normal(x[:, :2], (x[:, 2:] - 9).clamp(-5, 2).exp())),
}


def finding(make: Make) -> Finding:
    torch.manual_seed(0)
    others = set(POLICY_CHECKS) - {"arguments"}
    return check_policy(Made(make), torch.randn(ROWS, OBSERVATIONS), skip=others)["arguments"]


@pytest.mark.parametrize("name", RAW)
def test_a_raw_number_where_bounds_are_is_found(name: str) -> None:
    label, make = RAW[name]
    found = finding(make)
    assert found.verdict is Verdict.FAILED
    assert f"Nothing keeps {label} of " in found.cause


@pytest.mark.parametrize("name", SQUASHED)
def test_probabilities_as_logits_are_found(name: str) -> None:
    found = finding(SQUASHED[name])
    assert found.verdict is Verdict.FAILED
    assert "given probabilities as logits" in found.cause


@pytest.mark.parametrize("name", CLAMPED)
def test_what_lies_outside_its_clamp_is_found(name: str) -> None:
    found = finding(CLAMPED[name])
    assert found.verdict is Verdict.FAILED
    assert "outside the clamp" in found.cause


class AtBound(nn.Module):
    """A policy whose log_std lies where a clamp after the last step has put it."""

    def __init__(self, clamp: Callable[[Tensor], Tensor], start: float) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.network = nn.Sequential(nn.Linear(OBSERVATIONS, 16), nn.Tanh(), nn.Linear(16, 2))
        self.log_std, self.clamp = nn.Parameter(torch.full((2,), start)), clamp

    def forward(self, observations: Tensor) -> Any:
        return joint(Normal(self.network(observations), self.clamp(self.log_std).exp()))


BOUNDS: dict[str, tuple[Callable[[Tensor], Tensor], float]] = {
    "the lower bound": (lambda x: x.clamp(-0.7, 2), -0.7),
    "the upper bound": (lambda x: x.clamp(-5, 0.5), 0.5),
    "from below": (lambda x: x.clamp(min=-1.0), -1.0),
    "a hard tanh": (nn.functional.hardtanh, 1.0),
    "a maximum": (lambda x: torch.maximum(x, torch.tensor(-1.0).to(x)), -1.0),
    "close to it": (lambda x: x.clamp(0, 2), 0.001),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("name", BOUNDS)
def test_a_parameter_at_the_bound_of_its_clamp_is_named(name: str, dtype: torch.dtype) -> None:
    policy, observations = AtBound(*BOUNDS[name]).to(dtype), torch.randn(ROWS, OBSERVATIONS)
    observations = observations.to(dtype)
    for each in (policy, lambda seen: policy(seen)):
        report = check_policy(each, observations, parameters=policy.named_parameters())
        assert report.passed, str(report)
        assert report["arguments"].verdict is Verdict.UNDECIDED
        assert "lies at the bound of its clamp" in report["arguments"].cause
        assert "in 2 of 2 dimensions" in report["arguments"].cause
        assert report["fisher"].verdict is Verdict.PASSED


@pytest.mark.parametrize("third", [True, False])
@pytest.mark.parametrize("name", BOUNDS)
def test_a_closure_passes_beside_a_parameter_at_the_bound_of_its_clamp(
    name: str, third: bool
) -> None:
    policy, observations = AtBound(*BOUNDS[name]), torch.randn(ROWS, OBSERVATIONS)
    with torch.no_grad():
        old = frozen(policy(observations))
        actions = old.sample()
    advantages = torch.randn(ROWS)

    def closure() -> Any:
        new = policy(observations)
        ratio = (new.log_prob(actions) - old.log_prob(actions)).exp()
        pair = -(ratio * advantages).mean(), mean_kl(old, new)
        return (*pair, new) if third else pair

    report = check_closure(closure, policy.named_parameters())
    assert report.passed, str(report)
    assert "At the bound of their clamp" in report["values"].cause
    assert "log_std" in report["values"].cause


def test_what_is_detached_is_found_beside_a_parameter_at_its_bound() -> None:
    policy = AtBound(*BOUNDS["the lower bound"])

    def detached(observations: Tensor) -> Any:
        mean = policy.network[2](policy.network[:2](observations).detach())
        return joint(Normal(mean, policy.clamp(policy.log_std).exp()))

    report = check_policy(
        detached, torch.randn(ROWS, OBSERVATIONS), parameters=policy.named_parameters()
    )
    assert [each.check for each in report.failures] == ["parameters"]
