"""Vine estimates Q without bias, and with less variance than single paths."""

from __future__ import annotations

import math
from collections.abc import Callable

import gymnasium as gym
import pytest
import torch
from gymnasium.vector import SyncVectorEnv
from lakes import GAMMA, Swing, Table, gradient, lake, lakes, pendulums
from tabular import table, tabular
from torch import Tensor, nn
from torch.distributions import Categorical

from trpo_optim.rollouts import (
    discounted_returns,
    policy_closure,
    single_path,
    vine,
    vine_closure,
)

pytestmark = pytest.mark.no_cover


@pytest.mark.slow
@pytest.mark.parametrize(
    ("horizon", "common"),
    [
        (1, True),
        (4, False),
        (200, True),
        *(pytest.param(*each, marks=pytest.mark.thorough) for each in [(1, False), (4, True)]),
        pytest.param(200, False, marks=pytest.mark.thorough),
    ],
)
def test_the_estimates_of_q_are_without_bias(horizon: int, *, common: bool) -> None:
    """Cut off with the true value of what follows, a branch of any length is."""
    torch.manual_seed(horizon)
    policy, envs = Table(), lakes()
    mdp = tabular(lake(), GAMMA)
    exact = mdp.action_values(table(policy.logits.detach()))
    values = mdp.state_values(table(policy.logits.detach())).float()
    batch = vine(
        envs,
        policy,
        steps=60,
        states=300,
        horizon=horizon,
        gamma=GAMMA,
        critic=None if horizon == 200 else lambda states: values[states],
        common_random_numbers=common,
        seed=0,
    )
    off = batch.q.double() - exact[batch.observations]
    assert batch.q.shape == (300, 4)
    for action in range(4):
        error = float(off[:, action].std()) / math.sqrt(len(off))
        assert abs(float(off[:, action].mean())) < 4 * error + 1e-6
    near = torch.tensor([0, 1, 4])
    spread = float(off[torch.isin(batch.observations, near)].mean(1).std())  # rewards are rare
    for state in near:
        here = off[batch.observations == state].mean(1)
        assert abs(float(here.mean())) < 4 * spread / math.sqrt(len(here)) + 1e-6


@pytest.mark.slow
def test_common_random_numbers_make_differences_more_certain() -> None:
    """Two actions of the policy from the same state, over many such pairs."""
    envs, policy = pendulums(), Swing()

    torch.manual_seed(0)
    both: dict[bool, list[Tensor]] = {True: [], False: []}
    for seed in range(2):
        for common, found in both.items():
            batch = vine(
                envs,
                policy,
                steps=8,
                states=64,
                branches=2,
                horizon=20,
                gamma=0.97,
                common_random_numbers=common,
                seed=seed,
            )
            found.append(batch.q[:, 0] - batch.q[:, 1])
    together, apart = (float(torch.cat(both[each]).var()) for each in (True, False))
    assert together < 0.5 * apart


def cartpoles() -> SyncVectorEnv:
    return SyncVectorEnv([lambda: gym.make("CartPole-v1")] * 8, autoreset_mode="SameStep")


class Balance(nn.Module):
    """A random controller of the pole."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.network = nn.Sequential(nn.Linear(4, 16), nn.Tanh(), nn.Linear(16, 2))

    def forward(self, seen: Tensor) -> Categorical:
        return Categorical(logits=self.network(seen))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("make", "policy", "branches", "seeds"),
    [(cartpoles, Balance(), None, 6), (pendulums, Swing(), 4, 3)],
)
def test_per_sample_the_gradient_varies_less_than_single_paths(
    make: Callable[[], SyncVectorEnv], policy: nn.Module, branches: int | None, seeds: int
) -> None:
    """Section 5.2: for the same number of Q-values in the objective, 128."""
    torch.manual_seed(0)
    envs = make()
    found: dict[str, list[Tensor]] = {"vine": [], "path": []}
    for seed in range(seeds):
        branched = vine(
            envs,
            policy,
            steps=16,
            states=128 // (branches or 2),
            branches=branches,
            horizon=40,
            gamma=0.95,
            seed=seed,
        )
        assert branched.q.numel() == 128
        found["vine"].append(gradient(policy, vine_closure(policy, branched)()[0]))
        path = single_path(envs, policy, steps=16 + 40, seed=1000 + seed)
        path.valid[16:] = False  # 128 rows, each with 40 steps of what follows or more
        returns = discounted_returns(
            path.rewards, torch.zeros_like(path.rewards), path.ends, gamma=0.95
        )
        found["path"].append(gradient(policy, policy_closure(policy, path, returns)()[0]))
    by_vine, by_path = (float(torch.stack(each).var(0).sum()) for each in found.values())
    assert by_vine < 0.7 * by_path
