"""Closures with one fault each, and what is meant to find it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from broken import Bag
from problems import Problem, categorical, gaussian
from token_closures import Tokens
from torch import Tensor, nn
from torch.distributions import (
    Distribution,
    Independent,
    Normal,
    kl_divergence,
)


@dataclass(frozen=True)
class BrokenClosure:
    """A closure with a fault, for a problem whose old policy is the present one."""

    make: Callable[[Any], Callable[[], Any]]
    check: str
    says: str
    problem: Callable[[], Any] = gaussian
    options: Callable[[Any], dict[str, Any]] = lambda problem: {}


def altered(change: Callable[[Tensor, Tensor], Any]) -> Callable[[Problem], Callable[[], Any]]:
    """Return a closure whose two values go through a function."""
    return lambda problem: lambda: change(*problem.closure())


def on_random_rows(problem: Problem) -> Callable[[], Any]:
    def closure() -> Any:
        rows = torch.randint(len(problem.advantages), (16,))
        dist = problem.policy(problem.observations)
        ratio = (dist.log_prob(problem.actions) - problem.old_log_prob).exp()
        return -(ratio * problem.advantages)[rows].mean(), problem.closure()[1]

    return closure


def with_backward(problem: Problem) -> Callable[[], Any]:
    def closure() -> Any:
        loss, kl = problem.closure()
        loss.backward(retain_graph=True)
        return loss, kl

    return closure


def old_not_detached(problem: Problem) -> Callable[[], Any]:
    with torch.enable_grad():
        old = problem.policy(problem.observations)
        old_log_prob = old.log_prob(problem.actions)

    def closure() -> Any:
        dist = problem.policy(problem.observations)
        ratio = (dist.log_prob(problem.actions) - old_log_prob).exp()
        return -(ratio * problem.advantages).mean(), kl_divergence(old, dist).mean()

    return closure


def old_made_inside(problem: Problem) -> Callable[[], Any]:
    def closure() -> Any:
        with torch.no_grad():
            old = problem.policy(problem.observations)
        return problem.closure()[0], kl_divergence(old, problem.policy(problem.observations)).mean()

    return closure


def old_of_other_weights(problem: Problem) -> Callable[[], Any]:
    with torch.no_grad():
        for each in problem.parameters():
            each.add_(0.2)
    return problem.closure


class OwnScale(nn.Module):
    """A policy whose scale is the parameter itself."""

    def __init__(self) -> None:
        super().__init__()
        self.mean = nn.Linear(4, 2).double()
        self.scale = nn.Parameter(torch.ones(2, dtype=torch.float64))

    def forward(self, observations: Tensor) -> Distribution:
        mean = self.mean(observations)
        return Independent(Normal(mean, self.scale.expand_as(mean)), 1)


def own_scale() -> Problem:
    torch.manual_seed(0)
    return Problem(OwnScale(), torch.randn(32, 4).double())


def variation(problem: Problem) -> Callable[[], Any]:
    def closure() -> Any:
        dist: Any = problem.policy(problem.observations)
        old: Any = problem.old
        return problem.closure()[0], (old.probs - dist.probs).abs().sum(-1).mean()

    return closure


def summed_kl(problem: Problem) -> Callable[[], Any]:
    def closure() -> Any:
        dist = problem.policy(problem.observations)
        return problem.closure()[0], kl_divergence(problem.old, dist).sum()

    return closure


def with_own_old_log_prob(problem: Problem) -> Callable[[], Any]:
    def closure() -> Any:
        logs = problem.policy(problem.observations).log_prob(problem.actions)
        return -((logs - logs.detach()).exp() * problem.advantages).mean(), problem.closure()[1]

    return closure


def with_a_detached_ratio(problem: Problem) -> Callable[[], Any]:
    def closure() -> Any:
        logs = problem.policy(problem.observations).log_prob(problem.actions)
        ratio = (logs - problem.old_log_prob).exp().detach()
        return -(ratio * logs * problem.advantages).mean(), problem.closure()[1]

    return closure


def with_a_ratio_clamped_at_one(problem: Problem) -> Callable[[], Any]:
    def closure() -> Any:
        logs = problem.policy(problem.observations).log_prob(problem.actions)
        ratio = (logs - problem.old_log_prob).exp().clamp(max=1.0)
        return -(ratio * problem.advantages).mean(), problem.closure()[1]

    return closure


def turned_kl(problem: Problem) -> Callable[[], Any]:
    def closure() -> Any:
        dist = problem.policy(problem.observations)
        return problem.closure()[0], kl_divergence(dist, problem.old).mean()

    return closure


def broadcast(problem: Problem) -> Callable[[], Any]:
    advantages = problem.advantages - problem.advantages.mean()

    def closure() -> Any:
        dist = problem.policy(problem.observations)
        ratio = (dist.log_prob(problem.actions) - problem.old_log_prob).exp()
        return -(ratio[:, None] * advantages).mean(), problem.closure()[1]

    return closure


def with_a_critic(problem: Problem) -> Callable[[], Any]:
    critic = nn.Linear(4, 1).double()
    problem.policy.add_module("critic", critic)

    def closure() -> Any:
        loss, kl = problem.closure()
        return loss + 0.5 * (critic(problem.observations) - 1).square().mean(), kl

    return closure


def with_loss_inputs(problem: Problem) -> dict[str, Any]:
    return {
        "log_prob": lambda: problem.policy(problem.observations).log_prob(problem.actions),
        "advantages": problem.advantages,
    }


def bag() -> Problem:
    torch.manual_seed(0)
    return Problem(Bag(), torch.randint(10, (32, 4)))


def dropout() -> Problem:
    problem = gaussian()
    problem.policy = nn.Sequential(nn.Dropout(0.3), problem.policy)
    return problem


BROKEN_CLOSURES: dict[str, BrokenClosure] = {
    "one value": BrokenClosure(altered(lambda loss, kl: loss), "values", "returned one value"),
    "a float": BrokenClosure(
        altered(lambda loss, kl: (loss.item(), kl)), "values", "loss is a float.*without.*item"
    ),
    "a vector": BrokenClosure(
        altered(lambda loss, kl: (loss.expand(3), kl)), "values", r"shape \(3,\).*mean"
    ),
    "detached": BrokenClosure(
        altered(lambda loss, kl: (loss.detach(), kl)), "values", "detached: it does not depend"
    ),
    "backward inside": BrokenClosure(with_backward, "values", r"called backward\(\)"),
    "not a number": BrokenClosure(
        altered(lambda loss, kl: (loss * torch.nan, kl)), "values", "not a number"
    ),
    "an old policy with a graph": BrokenClosure(
        old_not_detached, "values", r"computed before it ran.*detach\(\)"
    ),
    "an old policy that shares a parameter's memory": BrokenClosure(
        lambda problem: problem.closure, "values", r"shares memory.*clone\(\)", problem=own_scale
    ),
    "random rows": BrokenClosure(on_random_rows, "deterministic", "draws a new minibatch"),
    "dropout": BrokenClosure(
        lambda problem: problem.closure, "deterministic", "dropout.*eval", problem=dropout
    ),
    "an entropy bonus in the KL": BrokenClosure(
        altered(lambda loss, kl: (loss, kl + 0.01)), "zero kl", "not about zero.*penalty"
    ),
    "an old policy of other weights": BrokenClosure(
        old_of_other_weights, "zero kl", "Compute the old distribution anew"
    ),
    "the old policy made inside": BrokenClosure(
        old_made_inside, "moving kl", "region has no effect.*outside the closure"
    ),
    "the KL's negative": BrokenClosure(
        altered(lambda loss, kl: (loss, -kl)), "kl", "does not rise.*no negative"
    ),
    "a total variation": BrokenClosure(variation, "kl", "where 4 is right", problem=categorical),
    "a KL summed over the batch": BrokenClosure(
        summed_kl, "kl scale", "summed over the batch of 64, not averaged.*mean_kl"
    ),
    "KL(new || old)": BrokenClosure(
        turned_kl, "kl scale", r"is KL\(new \|\| old\), not KL\(old \|\| new\).*mean_kl"
    ),
    "a KL averaged over padding": BrokenClosure(
        lambda tokens: tokens.closure(tokens.of_tokens, Tensor.mean),
        "kl scale",
        "elements that the mask leaves out count",
        problem=Tokens,
        options=Tokens.options,
    ),
    "a loss averaged over prompt and padding": BrokenClosure(
        lambda tokens: tokens.closure(Tensor.mean, tokens.of_tokens),
        "loss",
        r"elements that the mask leaves out move its gradient.*\[mask\]",
        problem=Tokens,
        options=Tokens.options,
    ),
    "the loss's negative": BrokenClosure(
        altered(lambda loss, kl: (-loss, kl)),
        "loss",
        "its sign is wrong.*maximize",
        options=with_loss_inputs,
    ),
    "a loss that broadcasts": BrokenClosure(
        broadcast, "loss", r"shapes broadcast.*\(N,\)", options=with_loss_inputs
    ),
    "the present log-probabilities as the old ones": BrokenClosure(
        with_own_old_log_prob, "loss slope", "a part of it is detached.*once before step"
    ),
    "a detached ratio": BrokenClosure(
        with_a_detached_ratio, "loss slope", "a part of it is detached.*line search"
    ),
    "a ratio clamped at 1": BrokenClosure(
        with_a_ratio_clamped_at_one, "loss slope", r"or has a kink.*not clamp the ratio at 1"
    ),
    "a critic's loss": BrokenClosure(
        with_a_critic, "second order", "does not depend on.*critic with its own optimizer"
    ),
}
