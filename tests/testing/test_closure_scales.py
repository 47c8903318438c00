"""check_closure compares KL and loss with those of the distributions, row by row."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from broken_closures import with_loss_inputs
from problems import Problem, categorical, gaussian
from token_closures import ROWS, STEPS, Tokens
from torch import Tensor, nn
from torch.distributions import Categorical, Distribution, Independent, Normal, kl_divergence

from trpo_optim import frozen, joint_kl, log_prob, mean_kl, sampled_kl
from trpo_optim.testing import ClosureReport, Verdict, assert_closure, check_closure

pytestmark = pytest.mark.no_cover

EVERY_SIZE = [2, 3, 64, 256, 4096]


def closure_of(problem: Problem, reduce: Callable[[Tensor], Tensor], *, third: bool) -> Any:
    def closure() -> Any:
        dist = problem.policy(problem.observations)
        ratio = (dist.log_prob(problem.actions) - problem.old_log_prob).exp()
        pair = -(ratio * problem.advantages).mean(), reduce(kl_divergence(problem.old, dist))
        return (*pair, dist) if third else pair

    return closure


def scale(closure: Any, problem: Problem, **options: Any) -> Any:
    return check_closure(closure, problem.parameters(), **options)["kl scale"]


@pytest.mark.parametrize("third", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("make", [gaussian, categorical])
@pytest.mark.parametrize("samples", EVERY_SIZE)
def test_a_kl_summed_over_the_batch_is_found_at_every_size(
    samples: int, make: Callable[..., Problem], dtype: torch.dtype, third: bool
) -> None:
    problem = make(samples=samples, dtype=dtype)
    report = check_closure(closure_of(problem, Tensor.sum, third=third), problem.parameters())
    finding = report["kl scale"]
    assert finding.verdict is Verdict.FAILED
    assert f"summed over the batch of {samples}, not averaged" in finding.cause
    assert finding.figures["kl over mean of rows"] == pytest.approx(samples, rel=0.01)
    assert_closure(closure_of(problem, Tensor.mean, third=third), problem.parameters())


def test_a_sum_over_a_batch_of_one_is_its_mean() -> None:
    problem = gaussian(samples=1)
    assert_closure(closure_of(problem, Tensor.sum, third=True), problem.parameters())


@pytest.mark.parametrize(
    ("reduce", "factor"),
    [
        (lambda kl: kl.mean() / 2, 0.5),
        (lambda kl: 5 * kl.mean(), 5),
        (lambda kl: kl.sum() / 8, 8),
    ],
    ids=["over dimensions", "a penalty's weight", "over micro-batches"],
)
def test_a_kl_with_a_factor_is_found(reduce: Any, factor: float) -> None:
    problem = gaussian()
    finding = scale(closure_of(problem, reduce, third=False), problem)
    assert finding.verdict is Verdict.FAILED
    assert f"is {factor:.4g} times the mean KL" in finding.cause


class Parts(nn.Module):
    """A tuple of parts, evaluated by the loss and once more by the KL."""

    def __init__(self) -> None:
        super().__init__()
        self.network = nn.Linear(4, 6)

    def forward(self, observations: Tensor) -> Any:
        out = self.network(observations)
        return Categorical(logits=out[:, :4]), Independent(Normal(out[:, 4:], 1.0), 1)


@pytest.mark.parametrize("third", [False, True])
def test_parts_are_summed_and_repeated_evaluations_are_not(third: bool) -> None:
    torch.manual_seed(0)
    policy, observations = Parts(), torch.randn(32, 4)
    old = frozen(policy(observations))
    actions = tuple(each.sample() for each in old)
    before, advantages = log_prob(old, actions), torch.randn(32)

    def closure(reduce: Any = Tensor.mean) -> Any:
        ratio = (log_prob(policy(observations), actions) - before).exp()
        new = policy(observations)
        pair = -(ratio * advantages).mean(), reduce(joint_kl(old, new))
        return (*pair, new) if third else pair

    assert_closure(closure, policy.parameters())
    report = check_closure(lambda: closure(Tensor.sum), policy.parameters())
    assert "summed over the batch of 32" in report["kl scale"].cause


def by_hand(problem: Problem, reduce: Callable[[Tensor], Tensor]) -> Any:
    """Return a closure that makes no distribution."""
    policy: Any = problem.policy
    with torch.no_grad():
        mean, log_std = policy.network(problem.observations), policy.log_std.clone()

    def closure() -> Any:
        new, new_log_std = policy.network(problem.observations), policy.log_std
        apart = (new - problem.actions).square() / (2 * (2 * new_log_std).exp())
        logs = -(apart + new_log_std + 0.9189385332046727).sum(-1)
        ratio = (logs - problem.old_log_prob).exp()
        spread = ((2 * log_std).exp() + (new - mean).square()) / (2 * (2 * new_log_std).exp())
        kl = (new_log_std - log_std + spread - 0.5).sum(-1)
        return -(ratio * problem.advantages).mean(), reduce(kl)

    return closure


@pytest.mark.parametrize("samples", [64, 1024])
def test_without_distributions_log_probabilities_give_the_kls_scale(samples: int) -> None:
    problem = gaussian(samples=samples)
    options = with_loss_inputs(problem)
    finding = scale(by_hand(problem, Tensor.sum), problem, **options)
    assert finding.verdict is Verdict.FAILED
    assert "summed over the batch" in finding.cause
    assert scale(by_hand(problem, Tensor.mean), problem, **options).verdict is Verdict.PASSED
    unknown = scale(by_hand(problem, Tensor.sum), problem)
    assert unknown.verdict is Verdict.UNDECIDED
    assert "third value, or pass log_prob" in unknown.remedy


@pytest.mark.parametrize("samples", [2, 64, 1024])
def test_an_estimated_kl_is_no_factor(samples: int) -> None:
    problem = gaussian(samples=samples)

    def closure() -> Any:
        new = problem.policy(problem.observations).log_prob(problem.actions)
        ratio = (new - problem.old_log_prob).exp()
        kl = sampled_kl(problem.old_log_prob, new, low_variance=True)
        return -(ratio * problem.advantages).mean(), kl, new

    assert scale(closure, problem).verdict is Verdict.PASSED


def told(tokens: Tokens, loss: Any, kl: Any, *, third: bool = True) -> ClosureReport:
    closure = tokens.closure(loss, kl, third=third)
    return check_closure(closure, tokens.model.parameters(), **tokens.options())


@pytest.mark.parametrize("third", [False, True])
@pytest.mark.parametrize("kl", ["of_tokens", "of_sequences", "of_means"])
@pytest.mark.parametrize("loss", ["of_tokens", "of_sequences", "of_means"])
def test_every_way_to_average_what_the_mask_counts_passes(loss: str, kl: str, third: bool) -> None:
    tokens = Tokens()
    report = told(tokens, getattr(tokens, loss), getattr(tokens, kl), third=third)
    assert report.passed, str(report)


def test_a_loss_averaged_over_prompt_and_padding_is_found() -> None:
    tokens = Tokens()
    left_out = ROWS * STEPS - int(tokens.mask.sum())
    report = told(tokens, Tensor.mean, tokens.of_tokens)
    assert [each.check for each in report.failures] == ["loss"]
    assert f"prompt or padding: {left_out} of {ROWS * STEPS}" in report["loss"].cause
    assert "move its gradient" in report["loss"].cause
    assert report["loss"].figures["weight outside the mask"] == pytest.approx(1, abs=1e-6)
    report = told(tokens, lambda gain: (gain * tokens.mask).mean(), tokens.of_tokens)
    assert "are zero, and count in the mean" in report["loss"].cause
    report = told(tokens, lambda gain: gain.mean() + 0.5 * tokens.of_tokens(gain), Tensor.mean)
    assert report["loss"].verdict is Verdict.FAILED
    assert "mask" in report["kl scale"].cause


def test_a_kl_averaged_over_prompt_and_padding_is_found() -> None:
    tokens = Tokens()
    for kl, says in (
        (Tensor.mean, "that the mask leaves out count"),
        (lambda each: (each * tokens.mask).mean(), "divided by the number of all elements"),
        (lambda each: (each * tokens.mask).sum(), "elements that count, not averaged"),
        (Tensor.sum, "summed over the batch"),
    ):
        for third in (False, True):
            report = told(tokens, tokens.of_tokens, kl, third=third)
            assert [each.check for each in report.failures] == ["kl scale"]
            assert says in report["kl scale"].cause


def test_without_the_mask_no_weighting_of_rows_is_a_fault() -> None:
    tokens = Tokens()
    closure = tokens.closure(tokens.of_tokens, tokens.of_tokens)
    assert_closure(closure, tokens.model.parameters())


def test_mean_kl_with_its_mask_passes() -> None:
    tokens = Tokens()

    def closure() -> Any:
        new = tokens.model(tokens.tokens)
        ratio = (new.log_prob(tokens.chosen) - tokens.old.log_prob(tokens.chosen))[
            tokens.mask
        ].exp()
        advantages = tokens.advantages[:, None].expand(ROWS, STEPS)[tokens.mask]
        return -(ratio * advantages).mean(), mean_kl(tokens.old, new, tokens.mask), new

    assert_closure(closure, tokens.model.parameters(), **tokens.options())


def test_a_mask_that_does_not_fit_is_named() -> None:
    tokens = Tokens()
    options = {**tokens.options(), "mask": tokens.mask[:, :4]}
    closure = tokens.closure(tokens.of_tokens, tokens.of_tokens)
    report = check_closure(closure, tokens.model.parameters(), **options)
    assert "log_prob has shape (12, 9) and the mask (12, 4)" in report["loss"].cause


@pytest.mark.parametrize("third", [True, False])
@pytest.mark.parametrize("joint", [True, False])
def test_a_kl_averaged_over_the_dimensions_of_an_action_is_found(joint: bool, third: bool) -> None:
    torch.manual_seed(0)
    policy, observations, advantages = nn.Linear(4, 3), torch.randn(64, 4), torch.randn(64)
    with torch.no_grad():
        old = frozen(Normal(policy(observations), 1.0))
    actions = old.sample()

    def log_prob() -> Tensor:
        logs: Tensor = Normal(policy(observations), 1.0).log_prob(actions).sum(-1)
        return logs

    def closure() -> Any:
        new = Normal(policy(observations), 1.0)
        kl = kl_divergence(old, new)
        change = (new.log_prob(actions) - old.log_prob(actions)).sum(-1)
        loss = -(change.exp() * advantages).mean()
        kl = kl.sum(-1).mean() if joint else kl.mean()
        return (loss, kl, new) if third else (loss, kl)

    report = check_closure(closure, policy.parameters(), log_prob=log_prob, advantages=advantages)
    assert report["kl scale"].verdict is (Verdict.PASSED if joint else Verdict.FAILED), str(report)
    assert joint or "averaged over the 3 numbers of each action" in report["kl scale"].cause


def test_a_mean_over_the_vectors_of_a_trajectory_passes() -> None:
    torch.manual_seed(0)
    policy, observations, advantages = nn.Linear(4, 3), torch.randn(40, 5, 4), torch.randn(40)

    def dist() -> Distribution:
        return Independent(Normal(policy(observations), 1.0), 1)

    with torch.no_grad():
        old = frozen(dist())
    actions = old.sample()

    def logs(new: Distribution) -> Tensor:
        result: Tensor = new.log_prob(actions).sum(1)
        return result

    def closure() -> Any:
        new = dist()
        ratio = (logs(new) - logs(old)).exp()
        every = torch.ones(40, 5, dtype=torch.bool)
        return -(ratio * advantages).mean(), mean_kl(old, new, every), new

    report = check_closure(
        closure, policy.parameters(), log_prob=lambda: logs(dist()), advantages=advantages
    )
    assert report["kl scale"].verdict is Verdict.PASSED, str(report)
