"""Errors call parameters as the optimizer was given them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.distributions import Categorical

from trpo_optim import TrustRegionError, TrustRegionOptimizer, frozen, mean_kl


class WithCritic(nn.Module):
    """A frozen encoder, then an actor and a critic."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.encoder, self.actor, self.critic = nn.Linear(3, 4), nn.Linear(4, 2), nn.Linear(4, 1)
        self.encoder.requires_grad_(False)


GIVEN: dict[str, tuple[Callable[[WithCritic], Any], str]] = {
    "names": (
        lambda agent: agent.named_parameters(),
        r"'critic.weight' \(shape \(1, 4\)\), 'critic.bias' \(shape \(1,\)\)\. No",
    ),
    "places": (
        lambda agent: agent.parameters(),
        r"4 \(shape \(1, 4\)\), 5 \(shape \(1,\)\), counted from 0\. No",
    ),
    "groups": (
        lambda agent: [{"params": each.parameters()} for each in (agent.actor, agent.critic)],
        r"0 of param_groups\[1\] \(shape \(1, 4\)\), 1 of .*, counted from 0\. No",
    ),
}


@pytest.mark.parametrize("third", [False, True])
@pytest.mark.parametrize("name", GIVEN)
def test_parameters_of_a_value_loss_are_called_as_they_were_given(name: str, third: bool) -> None:
    agent, observations = WithCritic(), torch.randn(64, 3)

    def policy() -> Categorical:
        return Categorical(logits=agent.actor(agent.encoder(observations)))

    old = frozen(policy())
    actions = old.sample()

    def closure() -> Any:
        new = policy()
        gain = (new.log_prob(actions) - old.log_prob(actions)).exp().mean()
        loss = agent.critic(agent.encoder(observations)).square().mean() - gain
        return (loss, mean_kl(old, new), new) if third else (loss, mean_kl(old, new))

    given, message = GIVEN[name]
    with pytest.raises(TrustRegionError, match=message):
        TrustRegionOptimizer(given(agent)).step(closure)
