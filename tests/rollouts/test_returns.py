"""Advantages and returns against the sums that define them, and against an exact solution."""

from __future__ import annotations

import math
from collections.abc import Callable

import gymnasium as gym
import pytest
import torch
from gymnasium.vector import SyncVectorEnv
from hypothesis import given
from hypothesis import strategies as st
from tabular import table, tabular
from torch import Tensor
from torch.distributions import Categorical

from trpo_optim import TrustRegionError
from trpo_optim.rollouts import (
    discounted_returns,
    explained_variance,
    gae,
    n_step_returns,
    single_path,
    trajectory_weights,
)

STEPS, ENVS = 12, 3


class Rows:
    """Random rewards, values and ends."""

    def __init__(self, seed: int) -> None:
        noise = torch.Generator().manual_seed(seed)
        shape = (STEPS, ENVS)
        self.rewards = torch.randn(shape, generator=noise, dtype=torch.float64)
        self.values = torch.randn(shape, generator=noise, dtype=torch.float64)
        self.ends = torch.rand(shape, generator=noise) < 0.2
        # What follows an end is another state than the next row's; half of the ends are for good.
        last = torch.randn(shape, generator=noise, dtype=torch.float64)
        last[torch.rand(shape, generator=noise) < 0.5] = 0.0
        following = torch.cat([self.values[1:], last[:1]])
        cut = self.ends.clone()
        cut[-1] = True
        self.next_values = torch.where(cut, last, following)

    def trajectory(self, step: int, env: int) -> range:
        """The rows from one on to the end of its trajectory."""
        ends = self.ends[step:, env].tolist()
        return range(step, step + ends.index(True) + 1 if True in ends else STEPS)

    def check(self, found: Tensor, expected: Callable[[int, int], float]) -> None:
        sums = [[expected(step, env) for env in range(ENVS)] for step in range(STEPS)]
        torch.testing.assert_close(
            found, torch.tensor(sums, dtype=torch.float64), rtol=0, atol=1e-12
        )


SEEDS, SHARES = st.integers(0, 2**31 - 1), st.floats(0.0, 1.0)


@given(SEEDS, SHARES, SHARES)
def test_gae_is_the_faded_sum_of_temporal_differences(seed: int, gamma: float, fade: float) -> None:
    rows = Rows(seed)
    found = gae(
        rows.rewards,
        rows.values,
        rows.next_values,
        rows.ends,
        gamma=gamma,
        gae_lambda=fade,
    )

    deltas = (rows.rewards + gamma * rows.next_values - rows.values).tolist()

    def expected(step: int, env: int) -> float:
        path = rows.trajectory(step, env)
        return float(sum((gamma * fade) ** (row - step) * deltas[row][env] for row in path))

    rows.check(found, expected)


@given(SEEDS, SHARES)
def test_returns_are_the_discounted_rewards_and_the_value_of_the_rest(
    seed: int, gamma: float
) -> None:
    rows = Rows(seed)

    def expected(step: int, env: int) -> float:
        path = rows.trajectory(step, env)
        rest = gamma ** len(path) * float(rows.next_values[path[-1], env])
        return rest + sum(gamma ** (row - step) * float(rows.rewards[row, env]) for row in path)

    found = discounted_returns(rows.rewards, rows.next_values, rows.ends, gamma=gamma)
    rows.check(found, expected)
    whole = gae(rows.rewards, rows.values, rows.next_values, rows.ends, gamma=gamma, gae_lambda=1.0)
    torch.testing.assert_close(found, whole + rows.values)


@given(SEEDS, SHARES, st.integers(1, 15))
def test_n_step_returns_take_n_rewards_or_those_to_the_end(
    seed: int, gamma: float, steps: int
) -> None:
    rows = Rows(seed)

    def expected(step: int, env: int) -> float:
        path = rows.trajectory(step, env)[:steps]
        rest = gamma ** len(path) * float(rows.next_values[path[-1], env])
        return rest + sum(gamma ** (row - step) * float(rows.rewards[row, env]) for row in path)

    found = n_step_returns(rows.rewards, rows.next_values, rows.ends, gamma=gamma, steps=steps)
    rows.check(found, expected)


def test_nan_beyond_an_end_does_not_reach_what_came_before() -> None:
    rows = Rows(0)
    rows.ends[:] = False
    rows.ends[5] = True
    rows.rewards[6:] = math.nan
    for found in (
        gae(rows.rewards, rows.values, rows.next_values, rows.ends, gamma=0.9, gae_lambda=0.9),
        discounted_returns(rows.rewards, rows.next_values, rows.ends, gamma=0.9),
        n_step_returns(rows.rewards, rows.next_values, rows.ends, gamma=0.9, steps=3),
    ):
        assert found[:6].isfinite().all()


@pytest.mark.slow
def test_monte_carlo_returns_visits_and_advantages_agree_with_the_exact_solution() -> None:
    gamma = 0.9

    def lake() -> gym.Env[int, int]:
        return gym.make("FrozenLake-v1", is_slippery=True, max_episode_steps=100)

    mdp = tabular(lake(), gamma)
    torch.manual_seed(0)
    logits = torch.randn(16, 4)
    policy = table(logits)
    values, advantages = mdp.state_values(policy), mdp.advantages(policy)
    batch = single_path(
        SyncVectorEnv([lake] * 64, autoreset_mode="SameStep"),
        lambda states: Categorical(logits=logits[states]),
        episodes=4000,
        seed=0,
    )
    known = batch.values(lambda states: values[states].float())
    for fade in (0.5, 1.0):
        found = batch.flat(gae(batch.rewards, *known, batch.ends, gamma=gamma, gae_lambda=fade))
        states, actions = batch.flat(batch.observations), batch.flat(batch.actions)
        for state, action in [(0, 0), (0, 2), (4, 1), (14, 2), (14, 1)]:
            chosen = found[(states == state) & (actions == action)].double()
            error = float(chosen.std()) / math.sqrt(len(chosen))
            assert abs(float(chosen.mean() - advantages[state, action])) < 4.5 * error
    starts = batch.flat(batch.starts)
    returns = discounted_returns(batch.rewards, known[1], batch.ends, gamma=gamma)
    from_start = batch.flat(returns)[starts].double()
    error = float(from_start.std()) / math.sqrt(len(from_start))
    assert abs(float(from_start.mean()) - mdp.expected_return(policy)) < 4.5 * error
    visits = torch.zeros(17, dtype=torch.float64)
    age = torch.zeros(64)
    for step in range(len(batch.rewards)):
        age = torch.where(batch.starts[step], 0.0, age + 1)
        weight = (gamma**age * batch.valid[step]).double()
        visits.index_add_(0, batch.observations[step], weight / 4000)
    exact = mdp.visitation(policy)
    assert float((visits - exact)[:16].abs().max()) < 0.05 * float(exact[:16].max())


def test_weights_are_the_ratios_of_the_actions_before() -> None:
    logs = torch.tensor([[1.0, 0.1], [2.0, 0.2], [3.0, 0.3], [4.0, 0.4]])
    starts = torch.tensor([[True, False], [False, False], [True, False], [False, True]])
    expected = torch.tensor([[0.0, 0.0], [1.0, 0.1], [0.0, 0.3], [3.0, 0.0]])
    torch.testing.assert_close(trajectory_weights(logs, starts).log(), expected)
    assert trajectory_weights(logs, starts, largest=2.0).max() == 2.0


@pytest.mark.slow
@pytest.mark.no_cover
def test_weights_make_an_earlier_policys_trajectories_count_as_the_present_ones() -> None:
    """Per-decision importance sampling estimates the exact return of the other policy."""
    gamma = 0.95

    def lake() -> gym.Env[int, int]:
        return gym.make("FrozenLake-v1", is_slippery=True, max_episode_steps=100)

    mdp = tabular(lake(), gamma)
    torch.manual_seed(0)
    behaviour = torch.zeros(16, 4)
    better = mdp.advantages(table(behaviour))[:16].float()
    present = 0.5 * better / better.std(1, keepdim=True).clamp_min(1e-6)
    batch = single_path(
        SyncVectorEnv([lake] * 16, autoreset_mode="SameStep"),
        lambda states: Categorical(logits=behaviour[states]),
        episodes=4_000,
        seed=0,
    )
    ratios = Categorical(logits=present[batch.observations]).log_prob(batch.actions) - Categorical(
        logits=behaviour[batch.observations]
    ).log_prob(batch.actions)
    weights = trajectory_weights(ratios, batch.starts)
    weighted = batch.rewards * weights * ratios.exp()
    returns = discounted_returns(weighted, torch.zeros_like(weighted), batch.ends, gamma=gamma)
    from_start = batch.flat(returns)[batch.flat(batch.starts)].double()
    error = float(from_start.std()) / math.sqrt(len(from_start))
    exact = mdp.expected_return(table(present))
    assert abs(float(from_start.mean()) - exact) < 4 * error
    assert abs(mdp.expected_return(table(behaviour)) - exact) > 4 * error  # it makes a difference


def test_explained_variance_is_one_for_the_truth_and_zero_for_the_mean() -> None:
    targets = torch.randn(50)
    assert explained_variance(targets, targets) == 1.0
    assert explained_variance(targets.mean().expand(50), targets) == pytest.approx(0.0, abs=1e-6)
    assert explained_variance(-targets, targets) == pytest.approx(-3.0)
    assert math.isnan(explained_variance(targets, torch.ones(50)))


GOOD = torch.zeros(4, 2)
ENDS = torch.zeros(4, 2, dtype=torch.bool)
REFUSED: dict[str, tuple[Callable[[], object], str]] = {
    "an array": (
        lambda: discounted_returns(GOOD.numpy(), GOOD, ENDS, gamma=0.9),  # type: ignore[arg-type]
        r"rewards is a ndarray.*torch.as_tensor\(rewards\)",
    ),
    "lengths": (
        lambda: gae(GOOD, GOOD[:3], GOOD, ENDS, gamma=0.9, gae_lambda=0.9),
        r"shapes differ.*'values': \(3, 2\)",
    ),
    "no rows": (
        lambda: discounted_returns(GOOD[:0], GOOD[:0], ENDS[:0], gamma=0.9),
        r"rewards is empty \(shape \(0, 2\)\)",
    ),
    "γ above 1": (
        lambda: gae(GOOD, GOOD, GOOD, ENDS, gamma=1.1, gae_lambda=0.9),
        r"gamma is 1.1; it must be in \[0, 1\]",
    ),
    "λ below 0": (
        lambda: gae(GOOD, GOOD, GOOD, ENDS, gamma=0.9, gae_lambda=-0.1),
        r"gae_lambda is -0.1",
    ),
    "γ NaN": (
        lambda: discounted_returns(GOOD, GOOD, ENDS, gamma=math.nan),
        "gamma is nan",
    ),
    "zero steps": (
        lambda: n_step_returns(GOOD, GOOD, ENDS, gamma=0.9, steps=0),
        "steps is 0; it must be a whole number of at least 1",
    ),
    "rows without environments": (
        lambda: n_step_returns(GOOD[0], GOOD[0], ENDS[0], gamma=0.9, steps=2),
        r"rewards has shape \(2,\); it must be \(T, N\)",
    ),
    "whole numbers": (
        lambda: discounted_returns(GOOD.long(), GOOD, ENDS, gamma=0.9),
        "rewards is torch.int64; it must be floating point",
    ),
    "half a step": (
        lambda: n_step_returns(GOOD, GOOD, ENDS, gamma=0.9, steps=2.5),  # type: ignore[arg-type]  # the mistake
        "steps is 2.5; it must be a whole number",
    ),
    "no weight": (lambda: trajectory_weights(GOOD, ENDS, largest=math.nan), "largest is nan"),
    "ends that are numbers": (
        lambda: discounted_returns(GOOD, GOOD, GOOD, gamma=0.9),
        "ends is torch.float32; it must be torch.bool",
    ),
    "starts that are numbers": (
        lambda: trajectory_weights(GOOD, GOOD),
        "starts is torch.float32",
    ),
    "ratios and starts": (lambda: trajectory_weights(GOOD, ENDS[:2]), "shapes differ"),
    "predictions": (lambda: explained_variance(GOOD, GOOD[0]), "shapes differ"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_makes_no_sense_is_refused_by_name(name: str) -> None:
    call, message = REFUSED[name]
    with pytest.raises(TrustRegionError, match=message):
        call()
