"""The testing kit finds no fault with sound policies, whatever their network and family."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributions as td
from devices import each_device
from families import FAMILIES, Family
from hypothesis import given, settings
from networks import NETWORKS, Network
from profiles import problems
from torch import Tensor, nn
from torch.distributions import AffineTransform, Distribution, Independent, Normal, TanhTransform

from trpo_optim.testing import (
    Verdict,
    assert_policy,
    check_policy,
)
from trpo_optim.testing.strategies import SmallPolicy, observations, policies

pytestmark = pytest.mark.no_cover

UNSOUND = {"batch norm", "dropout", "spectral norm", "TransformerEncoder, dropout"}
"""Networks of the optimizer's matrix that do not act as they are updated: these are findings."""

OTHERWISE_CHECKED = {"tokens, padded", "mixture, sampled KL"}
"""Families of several actions per row, and without a closed form of the KL."""


class Sound(nn.Module):
    """A network and a family as one policy."""

    def __init__(self, network: Network, family: Family) -> None:
        super().__init__()
        self.body, self.family = network.body, family
        self.free = nn.Parameter(torch.tensor([-0.3, 0.1, 0.2]))

    def forward(self, observations: tuple[Tensor, ...]) -> Any:
        return self.family.make(self.body(*observations), self.free)


def require_sound(network: str, family: str, seed: int, device: str = "cpu") -> None:
    torch.manual_seed(seed)
    made = NETWORKS[network]().to(device)
    assert_policy(Sound(made, FAMILIES[family]).to(device), made.seen(), seed=seed)


ONE_OF_EACH_KIND = {"MLP", "CNN", "LSTM, packed", "TransformerEncoder, eval", "weight norm"}
ONE_OF_EACH_KIND |= {"torch.compile", "picture, vector and token"}
SOUND_NETWORKS = [
    pytest.param(name, marks=[pytest.mark.thorough] * (name not in ONE_OF_EACH_KIND))
    for name in sorted(NETWORKS.keys() - UNSOUND)
]
FAMILIES_OF_EACH_KIND = {"Categorical, masked", "Bernoulli (MultiBinary)", "Poisson", "Normal"}
FAMILIES_OF_EACH_KIND |= {"Normal, tanh-squashed", "MultivariateNormal, precision", "Dirichlet"}
FAMILIES_OF_EACH_KIND |= {"Beta", "Laplace", "tuple (MultiDiscrete)", "dict (Dict)"}
SOUND_FAMILIES = [
    pytest.param(name, marks=[pytest.mark.thorough] * (name not in FAMILIES_OF_EACH_KIND))
    for name in sorted(FAMILIES.keys() - OTHERWISE_CHECKED)
]


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
@pytest.mark.usefixtures("compiler")
@each_device
@pytest.mark.parametrize("network", SOUND_NETWORKS)
def test_no_false_alarm_on_any_network(network: str, device: str) -> None:
    require_sound(network, "Categorical", 0, device)


@pytest.mark.slow
@each_device
@pytest.mark.parametrize("family", SOUND_FAMILIES)
def test_no_false_alarm_on_any_family(family: str, device: str) -> None:
    require_sound("MLP", family, 0, device)


def layer(inputs: int, outputs: int, gain: float) -> nn.Linear:
    """Return a layer as PPO scripts initialise it."""
    linear = nn.Linear(inputs, outputs)
    nn.init.orthogonal_(linear.weight, gain)
    nn.init.zeros_(linear.bias)
    return linear


class Script(nn.Module):
    """A policy as PPO scripts have it: ReLU or tanh, and a head of small weights."""

    def __init__(self, activation: type[nn.Module], family: Callable[[Tensor], Any]) -> None:
        super().__init__()
        self.network = nn.Sequential(
            layer(6, 32, 2**0.5), activation(), layer(32, 32, 2**0.5), activation()
        )
        self.head, self.family = layer(32, 4, 0.01), family

    def forward(self, observed: Tensor) -> Any:
        return self.family(self.head(self.network(observed / 255.0)))


SCRIPTS: dict[str, Callable[[Tensor], Any]] = {
    "categorical": lambda x: td.Categorical(logits=x),
    "gaussian": lambda x: td.Independent(td.Normal(x, 1.0), 1),
    "squashed to a range": lambda x: td.TransformedDistribution(
        td.Independent(td.Normal(x, 1.0), 1), [TanhTransform(), AffineTransform(0.0, 2.0)]
    ),
    "mixture": lambda x: td.MixtureSameFamily(
        td.Categorical(logits=x[:, :2]), td.Normal(x[:, 2:], 1.0)
    ),
}


@pytest.mark.parametrize("family", SCRIPTS)
@pytest.mark.parametrize(
    ("activation", "whole"),
    [
        (nn.Tanh, False),
        (nn.ReLU, True),
        pytest.param(nn.Tanh, True, marks=pytest.mark.thorough),
        pytest.param(nn.ReLU, False, marks=pytest.mark.thorough),
    ],
)
def test_no_false_alarm_on_policies_as_ppo_scripts_have_them(
    activation: type[nn.Module], family: str, whole: bool
) -> None:
    torch.manual_seed(0)
    observed = torch.randint(256, (128, 6)) if whole else 255 * torch.randn(128, 6)
    assert_policy(Script(activation, SCRIPTS[family]), observed)


@settings(max_examples=problems(share=0.1))
@given(policies(), observations())
def test_no_false_alarm_on_small_policies(policy: SmallPolicy, observed: Tensor) -> None:
    assert_policy(policy, observed)


class Flow(nn.Module):
    """A Gaussian shifted and stretched by what is learned, whose KL has no closed form."""

    def __init__(self) -> None:
        super().__init__()
        self.shift, self.log_scale = nn.Linear(5, 2), nn.Parameter(torch.zeros(2))

    def forward(self, observed: Tensor) -> Distribution:
        base = Normal(torch.zeros(len(observed), 2), 1.0)
        learned = AffineTransform(self.shift(observed), self.log_scale.exp())
        return Independent(td.TransformedDistribution(base, [learned]), 1)


class HeavyTails(nn.Module):
    """A Student's t, which torch knows no KL of."""

    def __init__(self) -> None:
        super().__init__()
        self.mean, self.log_scale = nn.Linear(5, 2), nn.Parameter(torch.zeros(2))

    def forward(self, observed: Tensor) -> Distribution:
        return Independent(td.StudentT(5.0, self.mean(observed), self.log_scale.exp()), 1)


class Squashed(nn.Module):
    """A Gaussian squashed by a transform that remembers its last values."""

    def __init__(self) -> None:
        super().__init__()
        self.mean, self.log_std = nn.Linear(5, 2), nn.Parameter(torch.zeros(2))

    def forward(self, observed: Tensor) -> Distribution:
        normal = Independent(Normal(self.mean(observed), self.log_std.exp()), 1)
        return td.TransformedDistribution(normal, [TanhTransform(cache_size=1)])


@pytest.mark.parametrize("policy", [Flow, HeavyTails, Squashed])
@pytest.mark.parametrize(
    "seed", [0, *(pytest.param(seed, marks=pytest.mark.thorough) for seed in (1, 2))]
)
def test_no_false_alarm_without_a_closed_form_or_with_a_cache(
    policy: type[nn.Module], seed: int
) -> None:
    torch.manual_seed(seed)
    report = check_policy(policy(), torch.randn(64, 5), seed=seed)
    assert report.passed, str(report)
    assert report["kl"].verdict is report["fisher"].verdict is Verdict.PASSED


class Many(nn.Module):
    """A Gaussian of so many dimensions that no proposal covers it."""

    def __init__(self, actions: int) -> None:
        super().__init__()
        self.mean, self.log_std = nn.Linear(5, actions), nn.Parameter(torch.zeros(actions))

    def forward(self, observed: Tensor) -> Distribution:
        return Independent(Normal(self.mean(observed), self.log_std.exp()), 1)


@pytest.mark.slow
@pytest.mark.parametrize("actions", [50, pytest.param(100, marks=pytest.mark.thorough)])
def test_no_false_alarm_on_actions_of_many_dimensions(actions: int) -> None:
    torch.manual_seed(0)
    report = check_policy(Many(actions), torch.randn(128, 5))
    assert report.passed, str(report)
    assert report["sampler"].verdict is Verdict.UNDECIDED


class Masked(nn.Module):
    """A policy whose observations end in which of four actions are allowed."""

    def __init__(self) -> None:
        super().__init__()
        self.network = nn.Sequential(nn.Linear(5, 16), nn.Tanh(), nn.Linear(16, 4))

    def forward(self, observed: Tensor) -> Distribution:
        seen, allowed = observed.split([5, 4], -1)
        return td.Categorical(logits=self.network(seen).masked_fill(allowed == 0, -torch.inf))


def test_no_false_alarm_on_masks_within_the_observations() -> None:
    torch.manual_seed(0)
    allowed = (torch.rand(64, 4) < 0.5).float()
    allowed[torch.arange(64), torch.randint(4, (64,))] = 1
    assert_policy(Masked(), torch.cat([torch.randn(64, 5), allowed], -1))
