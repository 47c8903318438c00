"""Faults that the checks once passed, and sound policies and closures that they once failed."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.distributions import (
    Categorical,
    Independent,
    Normal,
    Weibull,
    kl_divergence,
)
from torch.nn.utils.parametrizations import orthogonal

from trpo_optim import frozen, mean_kl
from trpo_optim.testing import ClosureReport, PolicyReport, Verdict, check_closure, check_policy
from trpo_optim.testing.__main__ import main

ROWS, ACTIONS = 64, 6


class Gaussian(nn.Module):
    """A linear Gaussian policy of several action dimensions."""

    def __init__(self, network: nn.Module | None = None) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.mean = nn.Linear(5, ACTIONS) if network is None else network
        self.log_std = nn.Parameter(torch.zeros(ACTIONS))

    def forward(self, x: Tensor) -> Any:
        return Independent(Normal(self.mean(x), self.log_std.exp()), 1)


class Setting:
    """A batch of a policy, and closures on it."""

    def __init__(self, policy: nn.Module) -> None:
        self.policy, self.seen = policy, torch.randn(ROWS, 5)
        self.advantages = torch.randn(ROWS)
        with torch.no_grad():
            self.old: Any = frozen(policy(self.seen))
            self.actions = self.old.sample()

    def log_prob(self) -> Tensor:
        found: Tensor = self.policy(self.seen).log_prob(self.actions)
        return found

    def loss(self, dist: Any) -> Tensor:
        ratio = (dist.log_prob(self.actions) - self.old.log_prob(self.actions)).exp()
        loss: Tensor = -(ratio * self.advantages).mean()
        return loss

    def check(self, closure: Callable[[], Any], *, known: bool = True) -> ClosureReport:
        log_prob = self.log_prob if known else None
        given = self.advantages if known else None
        parameters = self.policy.parameters()
        return check_closure(closure, parameters, log_prob=log_prob, advantages=given)


def verdict(report: ClosureReport | PolicyReport, name: str) -> Verdict:
    return {each.check: each.verdict for each in report.findings}[name]


def test_the_kl_of_a_part_of_the_action_does_not_pass() -> None:
    setting = Setting(Gaussian())

    def closure() -> Any:
        dist = setting.policy(setting.seen)
        kl = kl_divergence(setting.old.base_dist, dist.base_dist)[:, 0].mean()
        return setting.loss(dist), kl, dist

    assert verdict(setting.check(closure), "kl scale") is Verdict.UNDECIDED


@pytest.mark.parametrize("third", [False, True])
def test_a_kl_averaged_over_dimensions_does_not_pass_without_the_log_probabilities(
    third: bool,
) -> None:
    policy = Gaussian()
    setting = Setting(policy)
    old_log_prob = setting.old.log_prob(setting.actions)

    def closure() -> Any:
        dist = Normal(policy.mean(setting.seen), policy.log_std.exp())
        ratio = (dist.log_prob(setting.actions).sum(-1) - old_log_prob).exp()
        kl = kl_divergence(setting.old.base_dist, dist).mean()
        values = -(ratio * setting.advantages).mean(), kl, dist
        return values if third else values[:2]

    assert verdict(setting.check(closure, known=False), "kl scale") is Verdict.UNDECIDED
    assert verdict(setting.check(closure), "kl scale") is Verdict.FAILED


def test_advantages_of_zero_leave_the_loss_undecided() -> None:
    setting = Setting(Gaussian())
    setting.advantages.zero_()

    def closure() -> Any:
        dist = setting.policy(setting.seen)
        return setting.loss(dist), mean_kl(setting.old, dist), dist

    report = setting.check(closure)
    assert report.passed, str(report)
    assert verdict(report, "loss") is Verdict.UNDECIDED


def test_a_second_evaluation_in_the_loss_does_not_count_in_the_kl() -> None:
    setting = Setting(Gaussian())
    near = setting.seen + 0.02 * torch.randn(ROWS, 5)

    def closure(factor: float = 1.0) -> Any:
        dist, other = setting.policy(setting.seen), setting.policy(near)
        smooth = 0.01 * (dist.mean - other.mean).square().mean()
        return setting.loss(dist) + smooth, factor * mean_kl(setting.old, dist)

    report = setting.check(closure)
    assert report.passed, str(report)
    assert verdict(setting.check(lambda: closure(20.0)), "kl scale") is Verdict.FAILED


def test_a_parametrization_that_keeps_signs_is_sound() -> None:
    policy = Gaussian(nn.Sequential(orthogonal(nn.Linear(5, 5)), nn.Tanh(), nn.Linear(5, ACTIONS)))
    setting = Setting(policy)

    def closure() -> Any:
        dist = policy(setting.seen)
        return setting.loss(dist), mean_kl(setting.old, dist), dist

    report = setting.check(closure)
    assert report.passed, str(report)
    of_policy = check_policy(policy, setting.seen)
    assert of_policy.passed, str(of_policy)


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_a_policy_is_checked_in_any_grad_mode(mode: Callable[[], Any]) -> None:
    policy, seen = Gaussian(), torch.randn(ROWS, 5)
    with mode():
        report = check_policy(policy, seen)
    assert report.passed, str(report)


class Scaled(nn.Module):
    """Weibull actions: a family without a closed-form KL."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.linear = nn.Linear(5, 2)

    def forward(self, x: Tensor) -> Any:
        return Independent(Weibull(self.linear(x).exp(), torch.full((len(x), 2), 1.5)), 1)


@pytest.mark.parametrize("seed", range(3))
def test_actions_without_weight_leave_gradients_finite(seed: int) -> None:
    report = check_policy(Scaled(), torch.randn(ROWS, 5), seed=seed)
    assert report.passed, str(report)


class NanForOne(Gaussian):
    """NaN for a single row."""

    def forward(self, x: Tensor) -> Any:
        mean = self.mean(x) + (torch.nan if len(x) == 1 else 0.0)
        return Independent(Normal(mean, self.log_std.exp(), validate_args=False), 1)


class Sampling(Normal):
    """Draws NaN now and then."""

    def sample(self, shape: Any = ()) -> Tensor:
        drawn: Tensor = super().sample(shape)  # type: ignore[no-untyped-call]
        return drawn.masked_fill(torch.rand(drawn.shape) < 0.1, torch.nan)


class NanActions(Gaussian):
    """A policy that draws NaN."""

    def forward(self, x: Tensor) -> Any:
        scale = self.log_std.exp()
        return Independent(Sampling(self.mean(x), scale, validate_args=False), 1, False)


@pytest.mark.parametrize(("policy", "name"), [(NanForOne, "rows"), (NanActions, "sampler")])
def test_nan_fails(policy: Callable[[], nn.Module], name: str) -> None:
    assert verdict(check_policy(policy(), torch.randn(ROWS, 5)), name) is Verdict.FAILED


class Running:
    """Statistics that are called."""

    def __init__(self) -> None:
        self.count = torch.zeros(())

    def __call__(self, x: Tensor) -> Tensor:
        self.count = self.count + 1
        return x + 0.1 * self.count


class Remembering(Gaussian):
    """A policy with every kind of memory."""

    def __init__(self) -> None:
        super().__init__()
        self.running, self.recent, self.seen = Running(), deque([0], maxlen=3), {0}
        self.generator, self.noise = torch.Generator(), np.random.default_rng(0)

    def forward(self, x: Tensor) -> Any:
        self.recent.append(len(x))
        self.seen.add(len(self.seen))
        torch.rand(1, generator=self.generator)
        self.noise.random()
        return super().forward(self.running(x))

    def state(self) -> list[Any]:
        drawn = self.generator.get_state().tolist(), self.noise.bit_generator.state
        return [float(self.running.count), [*self.recent], sorted(self.seen), *drawn]


def test_all_that_a_policy_remembers_is_found_and_put_back() -> None:
    policy = Remembering()
    before = policy.state()
    report = check_policy(policy, torch.randn(ROWS, 5))
    assert policy.state() == before
    (state,) = (each for each in report.findings if each.check == "state")
    assert state.verdict is Verdict.FAILED
    assert "running" in str(state)


class Rows(nn.Module):
    """A table with a row for each observation, whose gradients are sparse."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.table = nn.Embedding(8, 3, sparse=True)

    def forward(self, x: Tensor) -> Categorical:
        return Categorical(logits=self.table(x))


def test_sparse_gradients_are_sound() -> None:
    report = check_policy(Rows(), torch.randint(8, (ROWS,)))
    assert verdict(report, "finite") is Verdict.PASSED, str(report)


def needs_an_argument(size: int) -> nn.Module:
    return nn.Linear(size, size)


@pytest.mark.parametrize(
    ("place", "options", "words"),
    [
        ("Gaussian", ["--observation-space", "5", "--rows", "0"], "--rows is 0; it must be at le"),
        ("Gaussian", ["--observation-space", "Discrete(0)"], "'Discrete(0)' is not known"),
        ("needs_an_argument", ["--observation-space", "5"], "calling it without arguments raises"),
    ],
)
def test_the_command_line_names_what_it_cannot_use(
    place: str, options: list[str], words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([f"{__name__}:{place}", *options]) == 2
    assert words in capsys.readouterr().err
