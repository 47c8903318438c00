"""State that begins as None or empty, tuples that are replaced, views of parameters, arrays."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from problems import Problem
from torch import Tensor, nn
from torch.distributions import Distribution, Independent, Normal

from trpo_optim import StepReport

pytestmark = pytest.mark.no_cover


def gauss(mean: Tensor) -> Distribution:
    return Independent(Normal(mean, torch.ones_like(mean)), 1)


class Cache(nn.Module):
    """Attention over all rows that it has ever seen."""

    def __init__(self) -> None:
        super().__init__()
        self.query, self.key, self.head = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 2)
        self.cache: dict[str, Tensor] = {}

    def forward(self, x: Tensor) -> Distribution:
        keys = self.key(x)
        if "keys" in self.cache:
            keys = torch.cat([self.cache["keys"], keys])
        self.cache["keys"] = keys.detach()
        return gauss(self.head((self.query(x) @ keys.T).softmax(-1) @ keys))

    def clear(self) -> None:
        self.cache.clear()


class Recurrent(nn.Module):
    """An LSTM that goes on from where it was, which is nowhere at first."""

    def __init__(self) -> None:
        super().__init__()
        self.lstm, self.head = nn.LSTM(4, 5), nn.Linear(5, 2)
        self.state: Any = None

    def forward(self, x: Tensor) -> Distribution:
        y, self.state = self.lstm(x, self.state)
        return gauss(self.head(y))

    def clear(self) -> None:
        self.state = None


class History(nn.Module):
    """Adds the mean of all that it has gathered in a list."""

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(4, 2)
        self.seen: list[Tensor] = []

    def forward(self, x: Tensor) -> Distribution:
        self.seen.append(x.mean(0) + 1)
        return gauss(self.head(x) + 0.1 * len(self.seen))

    def clear(self) -> None:
        self.seen.clear()


class Arrays(nn.Module):
    """Counts in an array, and in a number beside it."""

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(4, 2)
        self.count = np.zeros(2)
        self.calls = 0

    def forward(self, x: Tensor) -> Distribution:
        self.count += 1
        self.calls += 1
        return gauss(self.head(x) + 0.1 * float(self.count[0]) + 0.1 * self.calls)

    def clear(self) -> None:
        self.count[:] = self.calls = 0


def taken(policy: Any, *, third: bool, mode: str = "trpo") -> tuple[StepReport, float]:
    """Take a step on a policy that has gathered nothing; return the report and the true KL."""
    problem = Problem(policy, torch.randn(32, 4))
    policy.clear()
    closure = problem.closure_with_dist if third else problem.closure
    report = problem.optimizer(mode=mode, lr=0.01 if mode == "vanilla" else 1.0).step(closure)
    policy.clear()
    with torch.no_grad():
        return report, float(problem.closure()[1])


@pytest.mark.parametrize("third", [False, True])
@pytest.mark.parametrize("make", [Cache, Recurrent, History, Arrays])
def test_every_evaluation_begins_with_what_the_policy_had_gathered(
    make: Callable[[], nn.Module], third: bool
) -> None:
    torch.manual_seed(0)
    report, kl = taken(make(), third=third)
    assert report.accepted
    assert report.kl == pytest.approx(kl, rel=1e-3)
    assert 0.008 < kl <= 0.01


def test_a_tuple_that_is_replaced_is_put_back() -> None:
    torch.manual_seed(0)
    policy = Recurrent()
    problem = Problem(policy, torch.randn(32, 4))
    begun = policy.state
    values = [each.clone() for each in begun]
    with torch.no_grad():
        problem.old = policy(problem.observations)
        problem.old_log_prob = problem.old.log_prob(problem.actions)
    policy.state = begun
    assert problem.optimizer().step(problem.closure).accepted
    assert policy.state is begun
    assert all(map(torch.equal, begun, values))


ALIASES: dict[str, Callable[[Any], object]] = {
    "a detached parameter": lambda policy: setattr(policy, "seen", policy.log_std.detach()),
    "a buffer on its memory": lambda policy: policy.register_buffer(
        "first", policy.mean.weight.detach()
    ),
    "a view": lambda policy: setattr(policy, "turned", policy.mean.weight.detach().t()),
    "a state_dict": lambda policy: setattr(policy, "best", policy.state_dict()),
    "a frozen parameter on its memory": lambda policy: policy.register_parameter(
        "twin", nn.Parameter(policy.log_std.data, requires_grad=False)
    ),
}


class Own(nn.Module):
    """A Gaussian policy."""

    def __init__(self) -> None:
        super().__init__()
        self.mean = nn.Linear(4, 2)
        self.log_std = nn.Parameter(torch.zeros(2))
        self.also: Callable[[Any], object] = lambda _: None

    def forward(self, x: Tensor) -> Distribution:
        self.also(self)
        mean = self.mean(x)
        return Independent(Normal(mean, self.log_std.exp().expand_as(mean)), 1)


@pytest.mark.parametrize("mode", ["trpo", "natural", "vanilla"])
@pytest.mark.parametrize("name", ALIASES)
def test_a_view_of_a_parameter_is_no_state_of_its_own(name: str, mode: Any) -> None:
    vectors = []
    for alias in (lambda _: None, ALIASES[name]):
        torch.manual_seed(0)
        problem = Problem(Own(), torch.randn(32, 4))
        trained = problem.parameters()
        alias(problem.policy)
        optimizer = type(problem.optimizer())(trained, mode=mode, lr=0.1)
        assert optimizer.step(problem.closure).accepted
        vectors.append(torch.cat([each.detach().reshape(-1) for each in trained]))
    assert torch.equal(*vectors)


def test_a_buffer_may_be_given_other_data() -> None:
    class Mean(Own):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("seen", torch.zeros(4))

        def forward(self, x: Tensor) -> Distribution:
            self.get_buffer("seen").data = x.mean(0)
            return super().forward(x)

    torch.manual_seed(0)
    problem = Problem(Mean(), torch.randn(32, 4))
    problem.policy.get_buffer("seen").zero_()
    assert problem.optimizer().step(problem.closure).accepted
    assert not problem.policy.get_buffer("seen").any()


def test_a_critic_that_has_not_run_yet_is_left_alone() -> None:
    class Agent(Own):
        def __init__(self) -> None:
            super().__init__()
            self.critic = nn.LazyLinear(1)

    torch.manual_seed(0)
    policy = Agent()
    plain = Own()
    plain.load_state_dict(policy.state_dict(), strict=False)
    problem = Problem(plain, torch.randn(32, 4))
    problem.policy = policy
    optimizer = type(problem.optimizer())([*policy.mean.parameters(), policy.log_std])
    assert optimizer.step(problem.closure).accepted
