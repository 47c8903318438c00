"""Single path: every step that was taken, what followed it, and nothing else."""

from __future__ import annotations

import functools
import pickle
from collections.abc import Callable
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
import torch
from gymnasium.vector import AutoresetMode, SyncVectorEnv
from small_environments import Env, cartpole, coin, collected, each_mode, vector
from tabular import table, tabular
from torch import Tensor, nn
from torch.distributions import Categorical

from trpo_optim.rollouts import SinglePathBatch, capture, gae, restore, single_path


class Recorded(gym.Wrapper[Any, Any, Any, Any]):
    """Keeps every step: observation before, action, reward, how it ended, what followed."""

    def __init__(self, env: Env, log: list[Any]) -> None:
        super().__init__(env)
        self.log = log

    def reset(self, **options: Any) -> Any:
        self.last, info = self.env.reset(**options)
        return self.last, info

    def step(self, action: Any) -> Any:
        observation, *rest = self.env.step(action)
        self.log.append((self.last, action, *rest[:3], observation))
        self.last = observation
        return (observation, *rest)


def recorded(log: list[list[Any]], make: Callable[[], Env] = cartpole) -> list[Callable[[], Env]]:
    return [functools.partial(lambda each: Recorded(make(), each), each) for each in log]


@each_mode
def test_a_batch_holds_every_step_that_was_taken_and_no_other(mode: AutoresetMode) -> None:
    log: list[list[Any]] = [[], [], []]
    envs = SyncVectorEnv(recorded(log), autoreset_mode=mode)
    torch.manual_seed(0)
    first = single_path(envs, coin, steps=40, seed=0)
    parts = [first, single_path(envs, coin, steps=60, after=first)]
    for env in range(3):
        rows = [
            (
                batch.observations[step, env],
                batch.actions[step, env],
                batch.rewards[step, env],
                batch.terminated[step, env],
                batch.truncated[step, env],
            )
            for batch in parts
            for step in range(len(batch.rewards))
            if batch.valid[step, env]
        ]
        assert len(rows) == len(log[env])
        for mine, theirs in zip(rows, log[env], strict=True):
            before, action, reward, terminated, truncated, _ = theirs
            wanted = before, action, reward, terminated, truncated and not terminated
            for value, expected in zip(mine, wanted, strict=True):
                assert np.array_equal(value.numpy(), np.asarray(expected))
    lengths = sum(sum(batch.episode_lengths) for batch in parts)
    in_progress = int(parts[-1].end.lengths.sum())
    assert lengths + in_progress == sum(map(len, log))


@each_mode
def test_what_follows_a_row_is_what_the_environment_said(mode: AutoresetMode) -> None:
    log: list[list[Any]] = [[], [], []]
    envs = SyncVectorEnv(recorded(log), autoreset_mode=mode)
    torch.manual_seed(0)
    batch = single_path(envs, coin, steps=70, seed=0)
    weights = torch.tensor([1.0, 10.0, 100.0, 1000.0])
    values, following = batch.values(lambda observations: observations @ weights)
    for env in range(3):
        rows = batch.valid[:, env].nonzero().reshape(-1).tolist()
        for row, (before, _, _, terminated, _, after) in zip(rows, log[env], strict=True):
            assert values[row, env] == pytest.approx(float(before @ weights.numpy()), rel=1e-5)
            expected = 0.0 if terminated else float(after @ weights.numpy())
            assert following[row, env] == pytest.approx(expected, rel=1e-5)
    assert batch.truncated.any()
    assert batch.terminated.any()


@each_mode
@pytest.mark.parametrize("limit", [7, 100])
def test_temporal_differences_are_the_true_advantages(mode: AutoresetMode, limit: int) -> None:
    """On a deterministic lake, r + γV(s') − V(s) is A(s, a): by the table, not by sampling."""

    def lake() -> Env:
        return gym.make("FrozenLake-v1", is_slippery=False, max_episode_steps=limit)

    torch.manual_seed(1)
    logits = torch.randn(16, 4)
    mdp = tabular(lake(), 0.9)
    policy = table(logits)
    true_values, true_advantages = mdp.state_values(policy), mdp.advantages(policy)
    batch = single_path(
        vector(lake, 4, mode), lambda states: Categorical(logits=logits[states]), steps=150, seed=0
    )
    values, following = batch.values(lambda states: true_values[states].float())
    found = gae(batch.rewards, values, following, batch.ends, gamma=0.9, gae_lambda=0.0)
    expected = true_advantages[batch.observations, batch.actions].float()
    torch.testing.assert_close(batch.flat(found), batch.flat(expected), rtol=0, atol=1e-6)
    assert batch.terminated.any()
    assert batch.truncated.any() == (limit == 7)


@each_mode
def test_whole_episodes_are_split_evenly_and_none_is_cut(mode: AutoresetMode) -> None:
    envs = vector(cartpole, 4, mode)
    torch.manual_seed(0)
    batch = single_path(envs, coin, episodes=10, seed=0)
    ended = (batch.terminated | batch.truncated) & batch.valid
    assert ended.sum(0).tolist() == [3, 3, 2, 2]
    assert len(batch.episode_returns) == 10
    assert batch.starts.sum(0).tolist() == [3, 3, 2, 2]
    assert sum(batch.episode_lengths) == int(batch.valid.sum())
    assert batch.episode_returns == [float(length) for length in batch.episode_lengths]
    again = single_path(envs, coin, steps=50, after=batch)  # the cursor is sound
    assert int(again.valid.sum()) >= 4 * 50 - 4 * 10


def test_modes_of_autoreset_give_the_same_trajectories() -> None:
    def rows(mode: AutoresetMode) -> Any:
        envs = vector(cartpole, 1, mode)
        torch.manual_seed(0)
        batch = single_path(
            envs, lambda seen: Categorical(logits=4 * seen[:, 2:]), steps=60, seed=0
        )
        return batch.flat((batch.observations, batch.rewards))

    same, disabled = rows(AutoresetMode.SAME_STEP), rows(AutoresetMode.DISABLED)
    assert all(torch.equal(a, b) for a, b in zip(same, disabled, strict=True))


def test_rollouts_in_parts_are_the_rollout_in_one() -> None:
    def parts(*lengths: int) -> list[SinglePathBatch]:
        torch.manual_seed(0)
        envs, batches = vector(cartpole), list[SinglePathBatch]()
        for steps in lengths:
            options = {"after": batches[-1]} if batches else {"seed": 0}
            batches.append(single_path(envs, coin, steps=steps, **options))
        return batches

    (whole,), pieces = parts(60), parts(20, 1, 39)
    for name in ("observations", "actions", "rewards", "terminated", "truncated", "starts"):
        joined = torch.cat([getattr(batch, name) for batch in pieces])
        assert torch.equal(getattr(whole, name), joined)
    returns = [each for batch in pieces for each in batch.episode_returns]
    assert whole.episode_returns == returns


def test_a_rollout_goes_on_from_a_pickled_cursor_and_a_snapshot() -> None:
    torch.manual_seed(0)
    envs, others = vector(cartpole), vector(cartpole)
    first = single_path(envs, coin, steps=20, seed=0)
    kept = pickle.dumps((first.end, capture(envs), torch.get_rng_state()))
    expected = single_path(envs, coin, steps=30, after=first)
    others.reset()
    cursor, snapshot, state = pickle.loads(kept)
    restore(others, snapshot)
    torch.set_rng_state(state)
    batch = single_path(others, coin, steps=30, after=cursor)
    assert torch.equal(batch.observations, expected.observations)
    assert batch.episode_returns == expected.episode_returns


class Counting(nn.Module):
    """A recurrent policy whose state counts the steps of each episode."""

    def forward(self, seen: Tensor, state: Tensor, starts: Tensor) -> tuple[Categorical, Tensor]:
        counts = []
        for now in range(len(seen)):
            state = torch.where(starts[now, :, None], 0.0, state) + 1
            counts.append(state[0, :, 0])
        logits = torch.nn.functional.one_hot((torch.stack(counts) % 2).long(), 2) * 1e9
        return Categorical(logits=logits), state


@each_mode
def test_a_recurrent_state_runs_through_an_episode_and_no_further(mode: AutoresetMode) -> None:
    envs = vector(cartpole, 3, mode)
    first = single_path(envs, Counting(), steps=25, state=torch.zeros(1, 3, 1), seed=0)
    batch = single_path(envs, Counting(), steps=25, after=first)
    for each in (first, batch):
        replayed, _ = Counting()(each.observations, each.state, each.starts)
        assert torch.equal(replayed.probs.argmax(-1)[each.valid], each.actions[each.valid])
    assert not torch.equal(first.state, batch.state)
    for env in range(3):  # actions alternate from an episode's first step on, which takes 1
        expected = 0
        for part in (first, batch):
            for step in range(25):
                if part.valid[step, env]:
                    expected = 1 if part.starts[step, env] else 1 - expected
                    assert int(part.actions[step, env]) == expected


def test_a_cursor_shares_no_memory_with_the_environments() -> None:
    envs = SyncVectorEnv([cartpole] * 2, copy=False, autoreset_mode="SameStep")
    batch = single_path(envs, coin, steps=5, seed=0)
    before = batch.end.observations.copy()
    single_path(envs, coin, steps=5, after=batch)
    assert np.array_equal(batch.end.observations, before)


def test_actions_that_a_policy_writes_to_the_same_memory_are_kept_as_they_were() -> None:
    kept, taken = torch.zeros(2, dtype=torch.long), []

    def policy(seen: Tensor) -> Tensor:
        kept.copy_(seen[:, 2] > 0)
        taken.append(kept.clone())
        return kept

    envs = gym.make_vec("CartPole-v1", num_envs=2, vectorization_mode="sync")
    batch = single_path(envs, policy, steps=20, seed=0)
    assert torch.equal(batch.actions, torch.stack(taken))
    assert len(batch.actions.unique()) == 2


def test_a_batch_is_shown_in_one_line() -> None:
    batch = collected()
    assert repr(batch) == (
        "SinglePathBatch(2 steps of 3 environments, 6 valid rows, 0 episodes ended)"
    )
