"""Modules that FSDP2 shards beside the policy: a step leaves them alone."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist
from fsdp_policies import core_of, half, sharded, task_of
from ranks import on_ranks, values_of
from torch import Tensor

from trpo_optim.torch_private import fsdp_states

pytestmark = [
    pytest.mark.ranks,
    pytest.mark.no_cover,
    pytest.mark.skipif(torch.__version__ < "2.13", reason="refused"),
]


def state_of(module: Any) -> list[Any]:
    """Return what FSDP says of the parameters under a module."""
    under = set(map(id, module.modules()))
    states = [state for each, state in fsdp_states() if id(each) in under]
    groups = [group for state in states for group in state._fsdp_param_groups]
    records = [record for group in groups for record in group.fsdp_params]
    return [group._training_state for group in groups] + [each.sharded_state for each in records]


def accumulated(rank: int, policy: str) -> tuple[Tensor, bool, bool]:
    """Return a critic's gradient of two micro-batches, between which a policy may take a step.

    Returns:
        The gradient, whether FSDP held the critic as before after the step, and whether the step
        was accepted.
    """
    critic = sharded(task_of())
    core: Any = core_of(critic)
    first, second = critic.observations[32 * rank : 32 * (rank + 1)].chunk(2)
    core.set_requires_gradient_sync(False)
    core(first)[0].square().mean().backward()
    with torch.no_grad():
        core(first)  # which leaves the root whole
    before, accepted = state_of(core), True
    if policy:
        task = sharded(task_of()) if policy == "sharded" else task_of()
        optimizer = task.optimizer(process_group=dist.group.WORLD)
        accepted = optimizer.step(half(task, rank)).accepted
    same = state_of(core) == before
    core.set_requires_gradient_sync(True)
    core(second)[0].square().mean().backward()
    gradients: list[Any] = [each.grad for each in critic.parameters()]
    whole = [each.full_tensor().reshape(-1) for each in gradients if each is not None]
    return torch.cat(whole), same, accepted


def accumulated_beside_each(rank: int) -> list[tuple[Tensor, bool, bool]]:
    """Return what becomes of a critic without a step, and beside two kinds of policies."""
    return [accumulated(rank, policy) for policy in ("", "plain", "sharded")]


def test_a_step_leaves_the_gradients_that_a_critic_in_fsdp_accumulates() -> None:
    for (expected, *_), *others in values_of(on_ranks(2, accumulated_beside_each)):
        assert expected.norm() > 0
        for gradient, same, accepted in others:
            assert same
            assert accepted
            torch.testing.assert_close(gradient, expected, rtol=1e-12, atol=1e-14)
