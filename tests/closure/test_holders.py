"""What holds a parameter is found wherever the closure keeps it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributions import Categorical, Distribution

from trpo_optim import TrustRegionOptimizer


class Method(nn.Module):
    """A policy that acts by a method, and counts in it before any of its modules runs."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Linear(4, 3)
        self.seen = torch.zeros(())

    def act(self, x: Tensor) -> Distribution:
        self.seen += 1
        return Categorical(logits=self.body(x))


class Agent:
    """No module: parameters and statistics side by side."""

    def __init__(self) -> None:
        self.weight = nn.Parameter(torch.randn(4, 3))
        self.seen = torch.zeros(())

    def act(self, x: Tensor) -> Distribution:
        self.seen += 1
        return Categorical(logits=x @ self.weight)


class Slots:
    """The same, in slots, and found through a dict."""

    __slots__ = ("held",)

    def __init__(self) -> None:
        self.held = {"weight": nn.Parameter(torch.randn(4, 3)), "seen": torch.zeros(())}

    @property
    def seen(self) -> Tensor:
        return self.held["seen"]

    def act(self, x: Tensor) -> Distribution:
        self.held["seen"] += 1
        return Categorical(logits=x @ self.held["weight"])


def parameters_of(policy: Any) -> list[Tensor]:
    if isinstance(policy, nn.Module):
        return list(policy.parameters())
    return [policy.weight if isinstance(policy, Agent) else policy.held["weight"]]


@pytest.mark.parametrize("make", [Method, Agent, Slots])
@pytest.mark.parametrize("hidden", ["a variable", "a default", "an attribute", "a list"])
def test_what_holds_a_parameter_is_found_wherever_the_closure_keeps_it(
    make: Callable[[], Any], hidden: str
) -> None:
    torch.manual_seed(0)
    policy, observations = make(), torch.randn(20, 4)
    with torch.no_grad():
        old = policy.act(observations)
        actions = old.sample()
    policy.seen.zero_()

    def values(policy: Any) -> Any:
        assert policy.seen == 0
        dist = policy.act(observations)
        ratio = (dist.log_prob(actions) - old.log_prob(actions)).exp()
        return -(ratio * actions).mean(), torch.distributions.kl_divergence(old, dist).mean()

    class Holder:
        def __init__(self) -> None:
            self.inner = {"policies": [policy]}

        def closure(self) -> Any:
            return values(self.inner["policies"][0])

    def by_default(each: Any = policy) -> Any:
        return values(each)

    listed = [[policy]]
    closures: dict[str, Callable[[], Any]] = {
        "a variable": lambda: values(policy),
        "a default": by_default,
        "an attribute": Holder().closure,
        "a list": lambda: values(listed[0][0]),
    }
    assert TrustRegionOptimizer(parameters_of(policy)).step(closures[hidden]).accepted
    assert policy.seen == 0


def test_the_policy_of_very_many_closures_is_found() -> None:
    class Policy:
        def __init__(self) -> None:
            self.weight = torch.zeros(2, requires_grad=True)
            self.calls = torch.zeros(())

        def __call__(self) -> tuple[Tensor, Tensor]:
            self.calls = self.calls + 1
            raise RuntimeError("injected")

    policy = Policy()
    closures = [lambda place=place: policy() for place in range(2500)]
    with pytest.raises(RuntimeError, match="injected"):
        TrustRegionOptimizer([policy.weight]).step(closures)
    assert policy.calls == 0
