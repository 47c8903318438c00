"""What several batches must have in common, and what happens on ranks if they do not."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
import torch
import torch.distributed as dist
from earlier_batches import feedforward_batches
from pendulum_batches import Gaussian, feedforward
from ranks import on_ranks, values_of
from small_environments import cartpole, coin, vector
from test_recurrent_closures import recurrent
from torch import Tensor, nn
from torch.distributions import Categorical

from trpo_optim import RankError, TrustRegionError, TrustRegionOptimizer
from trpo_optim.rollouts import SinglePathBatch, policy_closure, single_path

POLICY, BATCH, ADVANTAGES = feedforward()
BATCHES, BOTH = [BATCH, BATCH], [ADVANTAGES, ADVANTAGES]
assert BATCH.log_prob is not None


def building(
    batches: Any = BATCHES, advantages: Any = BOTH, policy: Any = POLICY, **options: Any
) -> Callable[[], object]:
    return lambda: policy_closure(policy, batches, advantages, **options)


def changed(**values: Any) -> list[SinglePathBatch]:
    """The second batch with other values."""
    return [BATCH, replace(BATCH, **values)]


def with_one(values: Tensor, wrong: float) -> Tensor:
    values = values.clone()
    values[7, 2] = wrong
    return values


REFUSED: dict[str, tuple[Callable[[], object], str]] = {
    "no batches": (building([], []), "got an empty list; it takes what single_path"),
    "something else in the list": (
        building([BATCH, ADVANTAGES]),
        "got a list; it takes what single_path",
    ),
    "one tensor for two batches": (
        building(advantages=ADVANTAGES),
        "got 2 batches and advantages as one value. Pass a list with one for each batch",
    ),
    "one advantages for two batches": (
        building(advantages=[ADVANTAGES]),
        "got 2 batches and 1 advantages",
    ),
    "a list for one batch": (
        building(BATCH, [ADVANTAGES]),
        "advantages is a list, and policy_closure.. got one batch",
    ),
    "weights in a list for one batch": (
        building(BATCH, ADVANTAGES, weights=[ADVANTAGES]),
        "weights is a list",
    ),
    "one weights for two batches": (
        building(weights=[None]),
        "got 2 batches and 1 weights",
    ),
    "three batch weights": (
        building(batch_weights=(1.0, 1.0, 1.0)),
        "got 2 batches and 3 batch_weights",
    ),
    "no batch weight": (
        building(batch_weights=(1.0, 0.0)),
        "batch_weights holds 0.0; each must be a finite number above 0. Leave out",
    ),
    "a batch weight that is no number": (
        building(batch_weights=(1.0, math.nan)),
        "batch_weights holds nan",
    ),
    "batch weights for one batch": (
        building(BATCH, ADVANTAGES, batch_weights=(1.0,)),
        "batch_weights and max_batch_kl are for a list",
    ),
    "a limit for one batch": (
        building(BATCH, ADVANTAGES, max_batch_kl=0.1),
        "batch_weights and max_batch_kl are for a list",
    ),
    "no limit": (building(max_batch_kl=0.0), "max_batch_kl is 0.0; it must be above 0, in nats"),
    "log-probabilities by hand": (
        building(sampling_log_prob=BATCH.log_prob),
        r"Each batch of a list has its own log_prob; pass dataclasses.replace",
    ),
    "no log-probabilities": (
        building(changed(log_prob=None)),
        r"batch\[1\] has no log_prob, which the ratios.*replace\(batch, log_prob",
    ),
    "a log-probability that is no number": (
        building(changed(log_prob=with_one(BATCH.log_prob, -math.inf))),
        r"batch\[1\].log_prob is -inf at step 7 of environment 2.*inside the support",
    ),
    "log-probabilities of flat rows": (
        building(changed(log_prob=torch.zeros(200))),
        r"batch\[1\].log_prob has shape \(200,\) and the batch \(50, 4\)",
    ),
    "advantages of flat rows": (
        building(advantages=[ADVANTAGES, torch.zeros(200)]),
        r"advantages\[1\] has shape \(200,\)",
    ),
    "no advantages": (building(BATCH, None), "advantages is a NoneType; it must be a tensor"),
    "an array of advantages": (
        building(advantages=[ADVANTAGES, ADVANTAGES.numpy()]),
        r"advantages\[1\] is a ndarray; it must be a tensor.*torch.as_tensor",
    ),
    "complex advantages": (
        building(BATCH, ADVANTAGES + 0j),
        "advantages is torch.complex64; it must hold real numbers",
    ),
    "a number for weights": (building(weights=[None, 1.0]), r"weights\[1\] is a float"),
    "an array of log-probabilities": (
        building(BATCH, ADVANTAGES, sampling_log_prob=BATCH.log_prob.numpy()),
        "sampling_log_prob is a ndarray",
    ),
    "NaN advantages": (
        building(advantages=[with_one(ADVANTAGES, math.nan), ADVANTAGES]),
        r"advantages\[0\] is nan at step 7 of environment 2",
    ),
    "negative weights": (
        building(weights=[None, torch.full((50, 4), -0.5)]),
        r"weights\[1\] holds -0.5; a weight is a ratio",
    ),
    "infinite weights": (
        building(weights=[None, with_one(ADVANTAGES.abs(), math.inf)]),
        r"weights\[1\] is inf at step 7 of environment 2; it must be a number. Pass largest= to tr",
    ),
    "an empty batch": (
        building(changed(valid=torch.zeros(50, 4, dtype=torch.bool))),
        r"batch\[1\] is empty: no row is valid",
    ),
    "other observations": (
        building(changed(observations=torch.zeros(50, 4, 5))),
        r"observations of batch\[0\] have the form \(3,\), and of batch\[1\] the form \(5,\)",
    ),
    "other actions": (
        building(changed(actions=(BATCH.actions, BATCH.actions))),
        r"actions of batch\[0\] .* \(1,\), and of batch\[1\] the form \(\(1,\), \(1,\)\)",
    ),
    "other names in the info": (
        building(changed(info={"mask": torch.ones(50, 4, 2)})),
        r"info of batch\[0\] have the form {}, and of batch\[1\] the form {'mask': \(2,\)}",
    ),
    "a state in one of them": (
        building(changed(state=torch.zeros(1, 4, 8))),
        r"state of batch\[0\] have the form None, and of batch\[1\] the form \(1, 8\)",
    ),
    "an estimate of the KL": (building(sampled=True), "sampled=True needs actions of the old"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_makes_no_sense_is_refused_by_name(name: str) -> None:
    call, message = REFUSED[name]
    before = torch.get_rng_state()
    with pytest.raises(TrustRegionError, match=message):
        call()
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("array", [np.array, torch.tensor, tuple])
def test_batch_weights_may_be_any_array(array: Callable[[list[float]], Any]) -> None:
    built = policy_closure(POLICY, BATCHES, BOTH, batch_weights=array([1.0, 0.5]))
    rows = int(BATCH.valid.sum())
    assert built.weights == [rows, 0.5 * rows]


def test_states_of_another_size_are_refused() -> None:
    policy, batch, advantages = recurrent()
    other = replace(batch, state=(torch.zeros(1, 4, 9),))
    with pytest.raises(TrustRegionError, match=r"form \(\(1, 8\),\), and of batch\[1\] the form"):
        policy_closure(policy, [batch, other], [advantages, advantages])


class Masked(gym.Wrapper[Any, Any, Any, Any]):
    """Says that one action is legal, now the one and now the other."""

    count = 0

    def reset(self, **options: Any) -> Any:
        return self.env.reset(**options)[0], {"mask": np.array([True, True])}

    def step(self, action: Any) -> Any:
        self.count += 1
        return *self.env.step(action)[:4], {"mask": np.array([True, self.count % 2 == 0])}


class Remembering(nn.Module):
    """A recurrent policy that takes legal actions only."""

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(4, 2)

    def forward(self, seen: Tensor, state: Tensor, starts: Tensor, mask: Tensor) -> Any:
        return Categorical(logits=self.head(seen).masked_fill(~mask, -torch.inf)), state


def test_what_pads_a_shorter_batch_makes_no_nan() -> None:
    """Where no action is legal there is no distribution, and the gradient of all rows is NaN."""
    torch.manual_seed(0)
    policy, batches = Remembering(), []
    for steps in (5, 9):
        state = torch.zeros(1, 2, 1)
        envs = vector(lambda: Masked(cartpole()), 2)
        batches.append(single_path(envs, policy, steps=steps, state=state, info="mask", seed=0))
    advantages = [torch.randn(len(batch.rewards), 2) for batch in batches]
    built = policy_closure(policy, batches, advantages)
    gradients = torch.autograd.grad(built()[0], list(policy.parameters()))
    assert all(bool(each.isfinite().all()) for each in gradients)
    assert TrustRegionOptimizer(policy.parameters()).step(built).accepted


def test_earlier_batches_of_an_unlike_policy_are_not_asked_for_a_ratio() -> None:
    """Without a list nothing needs log-probabilities, as ever."""
    batch = single_path(vector(cartpole), coin, steps=4, seed=0)
    plain = replace(batch, log_prob=None)
    assert policy_closure(coin, plain, torch.randn(4, 3)).batches == (0,)


def on_rank(rank: int) -> tuple[str, tuple[int, ...], float]:
    """Leave out a batch on rank 1 alone, then lack log-probabilities there."""
    policy, batches, advantages = feedforward_batches()
    if rank == 1:
        batches[1] = replace(batches[1], log_prob=batches[1].log_prob - 5.0)  # type: ignore[operator, arg-type]  # it has some
    options: dict[str, Any] = {"standardise": True, "process_group": dist.group.WORLD}
    built = policy_closure(policy, batches, advantages, max_batch_kl=3.0, **options)
    optimizer = TrustRegionOptimizer(policy.parameters(), process_group=dist.group.WORLD)
    kl = optimizer.step(built).kl
    if rank == 1:
        batches[2] = replace(batches[2], log_prob=None)
    try:
        policy_closure(policy, batches, advantages, **options)
    except RankError as error:
        return str(error), built.batches, kl
    except TrustRegionError as error:
        return f"own: {error}", built.batches, kl
    return "", built.batches, kl


@pytest.mark.ranks
def test_ranks_may_leave_out_different_batches_and_fail_together() -> None:
    (first, all_of_them, kl), (second, fewer, other) = values_of(on_ranks(2, on_rank))
    assert all_of_them == (0, 1, 2)
    assert fewer == (0, 2)
    assert kl == other
    assert 0 < kl <= 0.01
    assert "rank 1 raised trpo_optim.errors.TrustRegionError: batch[2] has no log_prob" in first
    assert "own: batch[2] has no log_prob" in second


def test_nothing_is_asked_of_the_policy_where_the_arguments_are_wrong() -> None:
    asked = []

    def policy(seen: Tensor) -> Any:
        asked.append(seen)
        return Gaussian()(seen)

    with pytest.raises(TrustRegionError):
        building(changed(log_prob=None), policy=policy, max_batch_kl=1.0)()
    assert not asked
