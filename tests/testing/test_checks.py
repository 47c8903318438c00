"""What the checks take, leave alone and say."""

from __future__ import annotations

import re
from typing import Any

import numpy as np
import pytest
import torch
from broken import Custom, Policy, policy_of
from broken_kls import custom_kl
from broken_reports import policy_report
from problems import Snapshot, gaussian
from torch import Tensor, nn
from torch.distributions import Distribution, Independent, Normal

from trpo_optim import TrustRegionError
from trpo_optim.testing import (
    POLICY_CHECKS,
    Verdict,
    assert_closure,
    assert_policy,
    check_closure,
    check_policy,
)


def test_a_check_leaves_everything_as_it_was() -> None:
    torch.manual_seed(0)
    policy = Policy(middle=nn.Dropout(0.5))
    observed = torch.randn(64, 5)
    before = Snapshot.of(policy)
    check_policy(policy, observed)
    assert before.differences(Snapshot.of(policy)) == []
    problem = gaussian()
    before = Snapshot.of(problem.policy)
    assert_closure(problem.closure, problem.parameters())
    assert before.differences(Snapshot.of(problem.policy)) == []


def test_a_report_reads_as_a_table_and_raises_with_it() -> None:
    report = policy_report("a hotter sampler")
    assert [finding.check for finding in report.findings] == list(POLICY_CHECKS)
    assert [finding.check for finding in report.failures] == ["sampler"]
    with pytest.raises(AssertionError, match="PolicyReport: sampler failed") as caught:
        report.require()
    assert str(report) in str(caught.value)
    assert re.search(
        r"^FAILED +sampler +distance over limit [\d.]+\n    Averages", str(report), re.M
    )
    with pytest.raises(KeyError):
        report["spelling"]


def test_functions_and_methods_can_be_checked_as_well() -> None:
    torch.manual_seed(0)
    weight = torch.randn(3, 2, requires_grad=True)

    def policy(observed: Tensor) -> Distribution:
        return Independent(Normal(observed @ weight, 1.0), 1)

    observed = torch.randn(64, 3)
    assert_policy(policy, observed, parameters=[weight])
    with pytest.raises(TrustRegionError, match=r"not a module.*parameters=\["):
        check_policy(policy, observed)
    agent = Agent()
    report = check_policy(agent.act, torch.randn(64, 5))
    assert report.passed
    assert report["parameters"].cause == "Not used by the policy: critic.weight, critic.bias."


class Agent(nn.Module):
    """An actor and a critic, as PPO scripts have them."""

    def __init__(self) -> None:
        super().__init__()
        self.actor, self.critic = Policy(), nn.Linear(5, 1)

    def act(self, observed: Tensor) -> Any:
        return self.actor(observed)


def test_given_actions_are_used() -> None:
    torch.manual_seed(0)
    policy, observed = Policy(), torch.randn(64, 5)
    actions = policy(observed).sample()
    assert check_policy(policy, observed, actions=actions).passed
    report = check_policy(policy, observed, actions=actions[..., None])
    assert "shape" in report["one action per row"].cause


class Boundless(Custom):
    """A distribution that does not say where its actions lie."""

    support = property(lambda self: _raise())


def _raise() -> None:
    raise NotImplementedError


@pytest.mark.parametrize("mean", [0.0, 1.0, 5.0, 20.0])
@pytest.mark.parametrize("maximize", [False, True])
def test_the_loss_is_checked_whatever_the_mean_of_the_advantages(
    mean: float, maximize: bool
) -> None:
    problem = gaussian(samples=512)
    advantages = torch.randn(512, dtype=torch.float64) + mean

    def finding(weights: Tensor, sign: float) -> Verdict:
        def closure() -> Any:
            dist = problem.policy(problem.observations)
            ratio = (dist.log_prob(problem.actions) - problem.old_log_prob).exp()
            return sign * (ratio * weights).mean(), problem.closure()[1]

        return check_closure(
            closure,
            problem.policy.named_parameters(),
            log_prob=lambda: problem.policy(problem.observations).log_prob(problem.actions),
            advantages=advantages,
            maximize=maximize,
        )["loss"].verdict

    right = 1.0 if maximize else -1.0
    assert finding(advantages, right) is Verdict.PASSED
    assert finding(advantages, -right) is Verdict.FAILED
    assert finding(advantages[:, None], right) is Verdict.FAILED


def test_what_does_not_apply_is_undecided_and_no_failure() -> None:
    torch.manual_seed(0)
    report = check_policy(policy_of(Boundless)(), torch.randn(64, 5), kl=custom_kl)
    assert report.passed
    undecided = [each.check for each in report.findings if each.verdict is Verdict.UNDECIDED]
    assert undecided == ["density", "sampler", "entropy"]
    report = policy_report("a backward that forbids a second, in half precision")
    assert report["step"].verdict is report["fisher"].verdict is Verdict.UNDECIDED


def test_a_batch_of_another_size_is_named() -> None:
    class First(Policy):
        def dist(self, mean: Tensor, std: Tensor) -> Any:
            return super().dist(mean[:7], std)

    report = check_policy(First(), torch.randn(64, 5))
    assert "batch shape (7,), and there are 64 observations" in report["one action per row"].cause


def test_a_policy_that_rejects_double_precision_is_checked_in_its_own() -> None:
    class Single(Policy):
        def forward(self, observed: Tensor) -> Any:
            return super().forward(observed.float())

        def double(self) -> Any:
            raise TypeError("single precision alone")

    torch.manual_seed(0)
    assert_policy(Single(), torch.randn(128, 5))


@pytest.mark.parametrize(
    ("observed", "options", "message"),
    [
        (np.zeros((8, 5)), {}, "observations hold a ndarray.*torch.as_tensor"),
        (None, {}, "observations hold a NoneType"),
        (torch.zeros(0, 5), {}, r"have \[0\] rows.*at least 2"),
        ((torch.zeros(3), {"b": torch.zeros(4)}), {}, r"have \[3, 4\] rows"),
        (torch.zeros(4, 5), {"draws": 1}, "draws is 1"),
    ],
)
def test_what_cannot_be_checked_is_refused(observed: Any, options: Any, message: str) -> None:
    with pytest.raises(TrustRegionError, match=message):
        check_policy(Policy(), observed, **options)


def test_a_policy_that_raises_is_one_finding() -> None:
    report = check_policy(Policy(), torch.randn(8, 4))
    assert len(report.failures) == 1
    assert "mat1 and mat2 shapes cannot be multiplied" in report.failures[0].cause
    assert check_policy(Policy(), torch.randn(64, 5), skip="step").passed


@pytest.mark.parametrize("call", [check_policy, check_closure])
def test_an_unknown_check_to_skip_is_named(call: Any) -> None:
    with pytest.raises(TrustRegionError, match=r"skip names \['spelling'\]"):
        call(Policy(), [], skip=["spelling"])
