"""A value loss is found behind an autograd.Function, too."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributions import Categorical
from torch.utils.checkpoint import checkpoint

from trpo_optim import TrustRegionError, TrustRegionOptimizer, frozen, log_prob, mean_kl


class Same(torch.autograd.Function):
    """Returns its input."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, slope: Tensor) -> Tensor:
        return slope


def reentrant(network: nn.Module, seen: Tensor) -> Any:
    return checkpoint(network, seen, use_reentrant=True)


FORMS: dict[str, Any] = {
    "plain": lambda network, seen: network(seen),
    "a function": lambda network, seen: Same.apply(network(seen)),  # type: ignore[no-untyped-call]
    "a reentrant checkpoint": reentrant,
}


@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad")
@pytest.mark.parametrize("third", [False, True])
@pytest.mark.parametrize("form", FORMS)
def test_a_value_loss_is_refused_and_the_policys_alone_serves(form: str, third: bool) -> None:
    torch.manual_seed(0)
    actor, critic = nn.Linear(3, 4), nn.Linear(3, 1)
    seen, advantages, targets = torch.randn(64, 3), torch.randn(64), torch.randn(64, 1)
    seen.requires_grad_(form == "a reentrant checkpoint")
    with torch.no_grad():
        old = frozen(Categorical(logits=actor(seen)))
        actions = old.sample()

    def closure(weight: float) -> Any:
        dist = Categorical(logits=FORMS[form](actor, seen))
        ratio = (log_prob(dist, actions) - log_prob(old, actions)).exp()
        loss = -(ratio * advantages).mean()
        if weight:
            loss = loss + weight * (FORMS[form](critic, seen) - targets).square().mean()
        return (loss, mean_kl(old, dist), dist) if third else (loss, mean_kl(old, dist))

    parameters = [*actor.parameters(), *critic.parameters()]
    for weight in (0.5, 1e-3):
        with pytest.raises(TrustRegionError, match="parameters that the KL does not depend on: 2"):
            TrustRegionOptimizer(parameters).step(lambda: closure(weight))  # noqa: B023 (at once)
    assert TrustRegionOptimizer(parameters).step(lambda: closure(0.0)).accepted
