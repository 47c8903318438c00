"""What check_closure says of closures that a step takes, and whose author may not mean them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from problems import Problem, gaussian
from torch import Tensor, nn
from torch.distributions import Categorical

from trpo_optim import frozen, joint_kl, mean_kl
from trpo_optim.testing import Verdict, check_closure, check_policy


def loss_inputs(problem: Problem) -> dict[str, Any]:
    return {
        "log_prob": lambda: problem.policy(problem.observations).log_prob(problem.actions),
        "advantages": problem.advantages,
    }


def test_log_probabilities_of_another_policy_are_noted() -> None:
    problem = gaussian()
    stale = problem.old_log_prob + 0.8 * torch.randn_like(problem.old_log_prob)

    def closure() -> tuple[Tensor, Tensor]:
        logs = problem.policy(problem.observations).log_prob(problem.actions)
        return -((logs - stale).exp() * problem.advantages).mean(), problem.closure()[1]

    finding = check_closure(closure, problem.parameters(), **loss_inputs(problem))["loss"]
    assert finding.verdict is Verdict.UNDECIDED
    assert 0.5 < finding.figures["cosine"] < 0.95
    assert "stale" in finding.cause


def test_a_light_entropy_bonus_is_not_noted() -> None:
    problem = gaussian()

    def closure() -> tuple[Tensor, Tensor]:
        loss, kl = problem.closure()
        return loss - 0.001 * problem.policy(problem.observations).entropy().mean(), kl

    report = check_closure(closure, problem.parameters(), **loss_inputs(problem))
    assert report["loss"].verdict is Verdict.PASSED
    assert report["loss slope"].verdict is Verdict.PASSED


@pytest.mark.parametrize("named", [False, True])
def test_what_no_step_moves_is_noted(named: bool) -> None:
    problem = gaussian()
    given: list[tuple[str, Any]] = list(problem.policy.named_parameters())
    left_out, unused = given.pop(), ("unused", torch.zeros(5, requires_grad=True))
    given.append(unused)
    parameters: Any = given if named else [each for _, each in given]
    finding = check_closure(problem.closure, parameters)["values"]
    assert finding.verdict is Verdict.PASSED
    assert "tensors that require gradients and are not among the parameters" in finding.cause
    assert f"Their shapes: {tuple(left_out[1].shape)}." in finding.cause
    place = "'unused'." if named else f"{len(given) - 1}, counted from 0."
    assert finding.cause.endswith(f"Neither loss nor KL depends on {place}")
    assert check_closure(problem.closure, problem.parameters())["values"].cause == ""


def test_one_error_of_all_checks_is_told_once() -> None:
    problem = gaussian()
    wrong: Any = lambda: problem.closure()[0]  # noqa: E731
    report = check_closure(wrong, problem.parameters())
    assert [each.check for each in report.failures] == ["values"]
    assert "raises the same as 'values'" in report["kl"].cause


def means(of: Callable[..., Tensor]) -> Callable[..., Tensor]:
    return lambda old, new: of(old, new).mean()


def test_a_policys_kl_may_be_one_number_for_every_row() -> None:
    problem = gaussian()
    rows, mean = (
        check_policy(problem.policy, problem.observations, kl=each)
        for each in (joint_kl, means(joint_kl))
    )
    assert rows.passed
    assert rows["kl"].figures == mean["kl"].figures


class SharedHead(nn.Module):
    """A policy whose last layer also gives the value."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.body, self.head = nn.Linear(4, 8), nn.Linear(8, 3)

    def both(self, observations: Tensor) -> tuple[Categorical, Tensor]:
        logits, value = self.head(self.body(observations).tanh()).split([2, 1], -1)
        return Categorical(logits=logits), value[:, 0]


@pytest.mark.parametrize("third", [False, True])
@pytest.mark.parametrize("share", [0.0, 0.5])
def test_a_value_loss_through_rows_of_a_shared_layer_is_noted(share: float, third: bool) -> None:
    agent, observations = SharedHead(), torch.randn(64, 4)
    with torch.no_grad():
        old = frozen(agent.both(observations)[0])
        actions = old.sample()
    advantages = torch.randn(64)

    def closure() -> Any:
        new, value = agent.both(observations)
        ratio = (new.log_prob(actions) - old.log_prob(actions)).exp()
        loss = share * (value - 1).square().mean() - (ratio * advantages).mean()
        return (loss, mean_kl(old, new), new) if third else (loss, mean_kl(old, new))

    finding = check_closure(closure, agent.named_parameters())["second order"]
    assert finding.verdict is (Verdict.UNDECIDED if share else Verdict.PASSED)
    assert ("elements of 'head.weight', 'head.bias'," in finding.cause) == bool(share)
