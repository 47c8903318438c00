"""Which actions vine tries from each state."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import gymnasium as gym
import torch
from torch import Tensor

from trpo_optim.distributions import log_prob, sample
from trpo_optim.distributions.nesting import mapped

__all__ = ["branch_actions", "log_probs", "width"]


def branch_actions(
    policy: Callable[[], Any],
    count: int,
    space: gym.Space[Any],
    branches: int | None,
    sampling: str,
    device: torch.device | str,
) -> tuple[Any, Tensor, Tensor | None]:
    """Return the actions to try from S states.

    Args:
        policy: Returns the policy's distribution there.
        count: S.
        space: The action space of one environment.
        branches: K. None: every action of a Discrete space.
        sampling: What draws K actions: ``"policy"``, or ``"uniform"`` for all alike that the policy
            does not rule out.
        device: Where the policy lives.

    Returns:
        The actions, (S, K, …); which of them to run, (S, K), those that the policy does not rule
        out; and ln q of them, (S, K), None where all are tried.
    """
    dist = policy()
    if branches is not None and sampling == "policy":
        drawn = [sample(dist) for _ in range(branches)]
        logs = torch.stack([log_prob(dist, each) for each in drawn], 1)
        tried = mapped(lambda *each: torch.stack(each, 1), *drawn)
        return tried, torch.ones_like(logs, dtype=torch.bool), logs
    assert isinstance(space, gym.spaces.Discrete)  # as required before
    actions = torch.arange(int(space.n), device=device).expand(count, -1)
    allowed = log_probs(dist, actions).exp() > 0
    if branches is None:
        return actions, allowed, None
    tried = torch.multinomial(allowed.double(), branches, replacement=True)
    logs = -allowed.sum(1, keepdim=True).to(torch.get_default_dtype()).log()
    return tried, torch.ones_like(tried, dtype=torch.bool), logs.expand(-1, branches)


def log_probs(dist: Any, actions: Any) -> Tensor:
    """Return ln π of actions of shape (S, K, …), (S, K).

    Args:
        dist: The policy in S states.
        actions: The actions.

    Returns:
        One number for each.
    """
    columns = range(width(actions))
    return torch.stack(
        [log_prob(dist, mapped(lambda each: each[:, k], actions)) for k in columns],  # noqa: B023 (used at once)
        1,
    )


def width(actions: Any) -> int:
    """Return K of actions of shape (S, K, …), or of dicts and tuples of such."""
    while not isinstance(actions, Tensor):
        actions = next(iter(actions.values() if isinstance(actions, Mapping) else actions))
    return actions.shape[1]
