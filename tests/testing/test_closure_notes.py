"""What check_closure says of closures that a step takes, and whose author may not mean them."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from problems import Problem, gaussian
from torch import Tensor, nn
from torch.distributions import Categorical, Independent, Normal, kl_divergence

from trpo_optim import Closures, frozen, joint_kl, mean_kl, sampled_kl
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
    assert finding.cause.endswith(f"so no step moves them: {place}")
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


@pytest.mark.parametrize("parts", [1, 2])
@pytest.mark.parametrize("third", [False, True])
@pytest.mark.parametrize("share", [0.0, 0.5])
def test_a_value_loss_through_rows_of_a_shared_layer_is_noted(
    share: float, third: bool, parts: int
) -> None:
    agent, observations = SharedHead(), torch.randn(64, 4)
    with torch.no_grad():
        old = frozen(agent.both(observations)[0])
        actions, old_logits = old.sample(), old.logits
    old_log_prob, advantages = old.log_prob(actions), torch.randn(64)

    def closure(rows: slice) -> Any:
        new, value = agent.both(observations[rows])
        ratio = (new.log_prob(actions[rows]) - old_log_prob[rows]).exp()
        loss = share * (value - 1).square().mean() - (ratio * advantages[rows]).mean()
        kl = mean_kl(Categorical(logits=old_logits[rows]), new)
        return (loss, kl, new) if third else (loss, kl)

    size = 64 // parts
    closures = [partial(closure, slice(n * size, (n + 1) * size)) for n in range(parts)]
    finding = check_closure(closures, agent.named_parameters())["second order"]
    assert finding.verdict is (Verdict.UNDECIDED if share else Verdict.PASSED)
    assert ("elements of 'head.weight', 'head.bias'," in finding.cause) == bool(share)


def test_curvature_on_rows_that_do_not_see_all_parameters_is_not_noted() -> None:
    torch.manual_seed(0)
    table, states, advantages = nn.Embedding(40, 3), torch.arange(40), torch.randn(40)
    old = frozen(Categorical(logits=table(states)))
    actions = old.sample()

    def closure(rows: slice) -> Any:
        new = Categorical(logits=table(states[rows]))
        ratio = (new.log_prob(actions[rows]) - old.log_prob(actions)[rows]).exp()
        kl = mean_kl(Categorical(logits=old.logits[rows]), new)
        return -(ratio * advantages[rows]).mean(), kl, new

    closures = Closures([partial(closure, slice(0, 40))], curvature=partial(closure, slice(0, 9)))
    assert check_closure(closures, table.parameters())["second order"].verdict is Verdict.PASSED


@pytest.mark.parametrize("factor", [1e-25, 1e-10, 1e10, 1e25])
@pytest.mark.parametrize("wrong", [False, True])
def test_the_size_of_the_loss_hides_nothing(factor: float, wrong: bool) -> None:
    problem = gaussian(dtype=torch.float32)

    def closure() -> tuple[Tensor, Tensor]:
        logs = problem.policy(problem.observations).log_prob(problem.actions)
        old = logs.detach() if wrong else problem.old_log_prob
        return -factor * ((logs - old).exp() * problem.advantages).mean(), problem.closure()[1]

    finding = check_closure(closure, problem.parameters())["loss slope"]
    assert finding.verdict is (Verdict.FAILED if wrong else Verdict.PASSED)


def test_a_loss_whose_rise_is_rounded_away_is_undecided() -> None:
    problem = gaussian(dtype=torch.float32)

    def closure() -> tuple[Tensor, Tensor]:
        loss, kl = problem.closure()
        return loss + 1e6, kl

    finding = check_closure(closure, problem.parameters())["loss slope"]
    assert (finding.verdict, "Rounding" in finding.cause) == (Verdict.UNDECIDED, True)


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("turned", [False, True])
def test_the_kl_of_the_other_order_is_found_for_every_policy(seed: int, turned: bool) -> None:
    torch.manual_seed(seed)
    network = nn.Sequential(nn.Linear(4, 16), nn.Tanh(), nn.Linear(16, 5))
    observations, advantages = torch.randn(64, 4), torch.randn(64)
    with torch.no_grad():
        old = frozen(Categorical(logits=network(observations)))
        actions = old.sample()

    def closure() -> Any:
        new = Categorical(logits=network(observations))
        ratio = (new.log_prob(actions) - old.log_prob(actions)).exp()
        kl = kl_divergence(new, old) if turned else kl_divergence(old, new)
        return -(ratio * advantages).mean(), kl.mean(), new

    assert check_closure(closure, network.parameters())["kl scale"].verdict is (
        Verdict.FAILED if turned else Verdict.PASSED
    )


@pytest.mark.parametrize("seed", range(3))
def test_an_estimate_of_a_kl_that_both_orders_share_is_not_of_the_other_order(seed: int) -> None:
    """It is a few per cent from both; one of them must not count as near, and the other as far."""
    torch.manual_seed(seed)
    network = nn.Sequential(nn.Linear(4, 16), nn.Tanh(), nn.Linear(16, 3))
    observations, advantages = torch.randn(2048, 4), torch.randn(2048)

    def policy() -> Any:
        return Independent(Normal(network(observations), 1.0), 1)

    with torch.no_grad():
        actions = policy().sample()
        old = policy().log_prob(actions)

    def closure() -> tuple[Tensor, Tensor]:
        new = policy().log_prob(actions)
        loss = -((new - old).exp() * advantages).mean()
        return loss, sampled_kl(old, new, low_variance=True)

    assert check_closure(closure, network.parameters())["kl scale"].verdict is Verdict.PASSED
