"""A rollout keeps the log-probabilities of what it drew, as ``policy_closure`` computes them."""

from __future__ import annotations

import itertools
import math
import pickle
from collections.abc import Callable
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
import torch
from gymnasium import wrappers
from pendulum_batches import Gaussian, feedforward, pendulum
from small_environments import cartpole, coin, each_mode, vector
from test_recurrent_closures import Recurrent
from test_rollout_faults import Failing
from torch import Tensor
from torch.distributions import (
    Bernoulli,
    Beta,
    Categorical,
    Distribution,
    Independent,
    Laplace,
    MixtureSameFamily,
    Normal,
)

from trpo_optim import TrustRegionError
from trpo_optim.rollouts import RolloutError, SinglePathBatch, policy_closure, single_path


def leaning(seen: Tensor) -> Categorical:
    return Categorical(logits=3 * seen[:, 2:])


@each_mode
def test_every_step_keeps_what_the_policy_gave_its_actions(mode: Any) -> None:
    batch = single_path(vector(cartpole, 3, mode), leaning, steps=40, seed=0)
    expected = (3 * batch.observations[..., 2:]).log_softmax(-1)
    assert batch.log_prob is not None
    torch.testing.assert_close(
        batch.log_prob, expected.gather(-1, batch.actions[..., None])[..., 0]
    )


def test_the_parts_of_an_action_are_summed() -> None:
    space = gym.spaces.Dict(
        {
            "push": gym.spaces.Discrete(2),
            "rest": gym.spaces.Tuple([gym.spaces.Box(-1, 1, (2,)), gym.spaces.Discrete(3)]),
        }
    )

    def policy(seen: Tensor) -> dict[str, Any]:
        stick = Independent(Normal(seen[:, :2], torch.tensor([0.5, 2.0])), 1)
        return {
            "push": leaning(seen),
            "rest": (stick, Categorical(logits=seen[:, :3])),
        }

    envs = vector(lambda: wrappers.TransformAction(cartpole(), lambda a: int(a["push"]), space), 2)
    batch = single_path(envs, policy, steps=30, seed=0)
    flat = policy(batch.flat(batch.observations))
    push, (stick, three) = (batch.flat(batch.actions[name]) for name in ("push", "rest"))
    by_hand = flat["push"].log_prob(push) + flat["rest"][1].log_prob(three)
    scale = torch.tensor([0.5, 2.0])
    deviations = (stick - batch.flat(batch.observations)[:, :2]) / scale
    by_hand += (-deviations.square() / 2 - scale.log() - math.log(2 * math.pi) / 2).sum(-1)
    assert batch.log_prob is not None
    torch.testing.assert_close(batch.flat(batch.log_prob), by_hand)


def test_legal_actions_of_the_info_count() -> None:
    class Masked(gym.Wrapper[Any, Any, Any, Any]):
        def reset(self, **options: Any) -> Any:
            return self.env.reset(**options)[0], {"mask": np.array([1, 0])}

        def step(self, action: Any) -> Any:
            return *self.env.step(action)[:4], {"mask": np.array([1, 0])}

    def policy(seen: Tensor, mask: Tensor) -> Categorical:
        return Categorical(logits=torch.zeros(len(seen), 2).masked_fill(mask == 0, -torch.inf))

    batch = single_path(vector(lambda: Masked(cartpole())), policy, steps=8, info="mask", seed=0)
    assert batch.log_prob is not None
    assert torch.equal(batch.log_prob, torch.zeros(8, 3))


def test_a_recurrent_policys_log_probabilities_are_those_of_whole_trajectories() -> None:
    torch.manual_seed(0)
    policy, envs = Recurrent(), pendulum()
    first = single_path(envs, policy, steps=20, state=(torch.zeros(1, 4, 8),), seed=0)
    batch = single_path(envs, policy, steps=20, after=first)
    with torch.no_grad():
        dist, _ = policy(batch.observations, batch.state, batch.starts)
    assert batch.log_prob is not None
    torch.testing.assert_close(batch.log_prob, dist.log_prob(batch.actions))


TURNS = itertools.count()
FAMILIES: dict[str, Callable[[Tensor], Distribution]] = {
    "Beta": lambda seen: Independent(Beta(seen[:, :1].exp(), seen[:, 1:2].exp() + 1), 1),
    "Bernoulli": lambda seen: Independent(Bernoulli(probs=seen[:, :1].sigmoid()), 1),
    "Normal of a shared scale": lambda seen: Independent(Normal(seen[:, :1], torch.tensor(0.3)), 1),
    "Categorical by probabilities": lambda seen: Independent(
        Categorical(probs=seen.sigmoid()[:, None]), 1
    ),
    "families in turn": lambda seen: Independent(
        (Normal if next(TURNS) % 3 else Beta)(seen[:, :1].exp(), seen[:, 1:2].exp() + 1), 1
    ),
    "Laplace": lambda seen: Independent(Laplace(seen[:, :1], 0.5), 1),
    "mixture": lambda seen: MixtureSameFamily(
        Categorical(logits=seen[:, :2]),
        Independent(Normal(torch.stack([seen[:, 2:3], seen[:, 3:]], 1), 0.5), 1),
    ),
}


@pytest.mark.parametrize("steps", [1, 64, 70])
@pytest.mark.parametrize("name", FAMILIES)
def test_every_family_gives_the_log_probability_of_its_own_distribution(
    name: str, steps: int
) -> None:
    family, dists, space = FAMILIES[name], [], gym.spaces.Box(-1, 1, (1,))

    def policy(seen: Tensor) -> Distribution:
        dists.append(family(seen))
        return dists[-1]

    def pushed(action: Any) -> int:
        return int(action[0] > 0)

    envs = vector(lambda: wrappers.TransformAction(cartpole(), pushed, space), 2)
    batch = single_path(envs, policy, steps=steps, seed=0)
    expected = [dist.log_prob(each) for dist, each in zip(dists, batch.actions, strict=True)]
    assert batch.log_prob is not None
    torch.testing.assert_close(batch.log_prob, torch.stack(expected))


def test_a_policy_may_write_its_next_output_to_the_same_memory() -> None:
    logits = torch.zeros(3, 2)

    def policy(seen: Tensor) -> Categorical:
        logits.copy_((3 * seen[:, 2:]).log_softmax(-1))
        dist = Categorical(logits=torch.zeros(3, 2))
        dist.logits = logits
        return dist

    batch = single_path(vector(cartpole), policy, steps=40, seed=0)
    expected = (3 * batch.observations[..., 2:]).log_softmax(-1)
    assert batch.log_prob is not None
    torch.testing.assert_close(
        batch.log_prob, expected.gather(-1, batch.actions[..., None])[..., 0]
    )


def test_half_precision_gives_single_precision() -> None:
    def policy(seen: Tensor) -> Categorical:
        return Categorical(logits=(5 * seen[:, 2:]).bfloat16())

    batch = single_path(vector(cartpole), policy, steps=20, seed=0)
    assert batch.log_prob is not None
    assert batch.log_prob.dtype == torch.float32
    assert float(batch.log_ratios(policy).abs().max()) < 1e-6


def test_double_precision_is_kept() -> None:
    def policy(seen: Tensor) -> Distribution:
        return Categorical(logits=seen[:, 2:].double())

    batch = single_path(vector(cartpole), policy, steps=4, seed=0)
    assert batch.log_prob is not None
    assert batch.log_prob.dtype == torch.float64


class Unknown(Distribution):
    """A distribution that can be sampled, and nothing else."""

    arg_constraints: dict[str, Any] = {}  # noqa: RUF012 (as torch declares it)

    def sample(self, sample_shape: Any = ()) -> Tensor:
        return torch.zeros(self.batch_shape, dtype=torch.long)


class Narrow(Categorical):
    """A distribution that samples what it has no density of, now and then."""

    def log_prob(self, value: Tensor) -> Tensor:
        if bool((value == 0).all()):
            raise ValueError("outside the support")
        logs: Tensor = super().log_prob(value)  # type: ignore[no-untyped-call]  # of torch
        return logs


WITHOUT: dict[str, Callable[[Tensor], Any]] = {
    "actions": lambda seen: (seen[:, 3] > 0).long(),
    "actions in a tuple": lambda seen: ((seen[:, 3] > 0).long(),),
    "no log-probability": lambda seen: Unknown(seen.shape[:1]),
    "an action outside the support": lambda seen: Narrow(logits=torch.zeros(len(seen), 2)),
    "one number for all": lambda seen: Independent(
        Categorical(logits=torch.zeros(len(seen), 2)), 1
    ),
}


@pytest.mark.parametrize("name", WITHOUT)
def test_a_rollout_without_log_probabilities_is_collected_as_ever(name: str) -> None:
    torch.manual_seed(0)
    batch = single_path(vector(cartpole), WITHOUT[name], steps=30, seed=0)
    assert batch.log_prob is None
    assert int(batch.valid.sum()) == 90
    with pytest.raises(TrustRegionError, match=r"no log_prob.*replace\(batch, log_prob"):
        batch.log_ratios(coin)
    with pytest.raises(TrustRegionError, match=r"batch\[0\] has no log_prob"):
        policy_closure(coin, [batch], [torch.zeros(30, 3)])


def test_a_distribution_is_not_asked_again_after_it_had_none() -> None:
    asked = []

    class Counted(Categorical):
        def log_prob(self, value: Tensor) -> Tensor:
            asked.append(1)
            raise NotImplementedError

    single_path(vector(cartpole), lambda seen: Counted(torch.ones(len(seen), 2)), steps=9, seed=0)
    assert len(asked) == 1


def test_sampling_draws_the_same_numbers_as_by_hand() -> None:
    torch.manual_seed(0)
    policy = Gaussian()
    torch.manual_seed(1)
    batch = single_path(pendulum(), policy, steps=3, seed=0)
    torch.manual_seed(1)
    for step in range(3):
        assert torch.equal(batch.actions[step], policy(batch.observations[step]).sample())


def test_what_came_before_a_failure_has_its_log_probabilities() -> None:
    envs = vector(lambda: Failing(cartpole(), 7), 2)
    with pytest.raises(RolloutError, match="the simulator is gone") as it:
        single_path(envs, leaning, steps=100, seed=0)
    batch = it.value.batch
    assert batch.log_prob.shape == batch.rewards.shape
    assert float(batch.log_ratios(leaning).abs().max()) < 1e-6


def test_they_are_pickled_with_the_batch() -> None:
    batch = feedforward()[1]
    again: SinglePathBatch = pickle.loads(pickle.dumps(batch))
    assert batch.log_prob is not None
    assert again.log_prob is not None
    assert torch.equal(again.log_prob, batch.log_prob)
