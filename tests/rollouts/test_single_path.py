"""Trajectories of real environments: which rows enter a batch, and what follows each of them."""

from __future__ import annotations

import functools
import pickle
from collections.abc import Callable
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
import torch
from gymnasium import wrappers
from gymnasium.vector import AutoresetMode, SyncVectorEnv
from tabular import table, tabular
from torch import Tensor, nn
from torch.distributions import Categorical, Independent, Normal

from trpo_optim import TrustRegionError
from trpo_optim.rollouts import RolloutError, SinglePathBatch, capture, gae, restore, single_path

MODES = list(AutoresetMode)
each_mode = pytest.mark.parametrize("mode", MODES, ids=lambda mode: mode.name)

Env = gym.Env[Any, Any]


def vector(
    make: Callable[[], Env], count: int = 3, mode: AutoresetMode = AutoresetMode.SAME_STEP
) -> SyncVectorEnv:
    return SyncVectorEnv([make] * count, autoreset_mode=mode)


def cartpole() -> Env:
    return gym.make("CartPole-v1", max_episode_steps=15)


def coin(observations: Tensor) -> Categorical:
    """A policy that tosses a coin for every observation."""
    return Categorical(logits=torch.zeros(len(observations), 2))


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


SPACES: dict[str, tuple[gym.Space[Any], Callable[[Any], Any], Callable[[Tensor], Any]]] = {
    "MultiDiscrete": (
        gym.spaces.MultiDiscrete([2, 3], start=[0, 5]),
        lambda action: int(action[0]),
        lambda n: (Categorical(torch.ones(len(n), 2)), Categorical(torch.ones(len(n), 3))),
    ),
    "MultiBinary": (
        gym.spaces.MultiBinary(3),
        lambda action: int(action[0]),
        lambda n: Independent(torch.distributions.Bernoulli(torch.full((len(n), 3), 0.5)), 1),
    ),
    "Box": (
        gym.spaces.Box(-0.1, 0.1, (2, 2), np.float32),
        lambda action: int(action[0, 1] > 0),
        lambda n: Independent(Normal(torch.zeros(len(n), 4), torch.ones(4)), 1),
    ),
    "Discrete from -1 on": (
        gym.spaces.Discrete(2, start=-1),
        lambda action: int(action) + 1,
        coin,
    ),
    "Dict of a Tuple": (
        gym.spaces.Dict(
            {
                "push": gym.spaces.Discrete(2),
                "rest": gym.spaces.Tuple([gym.spaces.Box(-1, 1, (1,)), gym.spaces.Discrete(3)]),
            }
        ),
        lambda action: int(action["push"]),
        lambda n: {
            "push": coin(n),
            "rest": (
                Independent(Normal(torch.zeros(len(n), 1), torch.ones(1)), 1),
                Categorical(torch.ones(len(n), 3)),
            ),
        },
    ),
}


@pytest.mark.parametrize("name", SPACES)
def test_actions_of_every_space_reach_the_environments_in_its_form(name: str) -> None:
    space, push, dist = SPACES[name]
    seen = []

    def taken(action: Any) -> int:
        assert space.contains(action), action
        seen.append(action)
        return int(push(action))

    envs = vector(lambda: wrappers.TransformAction(cartpole(), taken, space), 2)
    batch = single_path(envs, dist, steps=30, seed=0)
    assert len(seen) == 60
    assert len({str(each) for each in seen}) > 1
    assert int(batch.valid.sum()) == 60


def test_observations_of_nested_spaces_keep_their_form() -> None:
    space = gym.spaces.Dict(
        {
            "all": gym.spaces.Box(-np.inf, np.inf, (4,), np.float64),
            "more": gym.spaces.Tuple(
                [gym.spaces.Discrete(2), gym.spaces.Box(0, 255, (2, 2, 1), np.uint8)]
            ),
        }
    )

    def nested(observation: Any) -> Any:
        image = np.full((2, 2, 1), int(abs(observation[2]) * 1000) % 256, np.uint8)
        return {
            "all": observation.astype(np.float64),
            "more": (np.int64(observation[0] > 0), image),
        }

    forms = []

    def policy(seen: Any) -> Categorical:
        forms.append((seen["all"].dtype, seen["more"][0].shape, seen["more"][1].dtype))
        return coin(seen["all"])

    envs = vector(lambda: wrappers.TransformObservation(cartpole(), nested, space), 2)
    batch = single_path(envs, policy, steps=40, seed=0)
    assert set(forms) == {(torch.float32, (2,), torch.uint8)}
    assert batch.observations["more"][1].shape == (40, 2, 2, 2, 1)
    assert batch.flat(batch.observations)["all"].shape == (80, 4)
    values, following = batch.values(lambda seen: seen["all"][:, 0])
    assert values.shape == following.shape == (40, 2)
    assert len(batch.cut_rows) == len(batch.cut_observations["more"][0]) > 2


def test_a_policy_may_return_the_actions_themselves() -> None:
    batch = single_path(vector(cartpole), lambda seen: (seen[:, 3] > 0).long(), steps=30, seed=0)
    assert torch.equal(batch.actions, (batch.observations[..., 3] > 0).long())


def test_environments_that_reuse_their_memory_do_no_harm() -> None:
    def collected(*, copy: bool) -> SinglePathBatch:
        torch.manual_seed(0)
        return single_path(
            SyncVectorEnv([cartpole] * 2, copy=copy, autoreset_mode="SameStep"),
            coin,
            steps=30,
            seed=0,
        )

    shared, own = collected(copy=False), collected(copy=True)
    assert torch.equal(shared.observations, own.observations)
    assert torch.equal(shared.cut_observations, own.cut_observations)


def test_continuous_actions_are_kept_as_they_were_drawn() -> None:
    envs = vector(lambda: gym.make("Pendulum-v1"), 2)
    wide = lambda seen: Independent(Normal(torch.zeros(len(seen), 1), torch.full((1,), 9.0)), 1)  # noqa: E731
    assert single_path(envs, wide, steps=30, seed=0).actions.abs().max() > 2.0


def test_a_cursor_shares_no_memory_with_the_environments() -> None:
    envs = SyncVectorEnv([cartpole] * 2, copy=False, autoreset_mode="SameStep")
    batch = single_path(envs, coin, steps=5, seed=0)
    before = batch.end.observations.copy()
    single_path(envs, coin, steps=5, after=batch)
    assert np.array_equal(batch.end.observations, before)


class Unresettable(gym.Wrapper[Any, Any, Any, Any]):
    """An environment that begins once."""

    begun = False

    def reset(self, **options: Any) -> Any:
        if self.begun:
            raise ConnectionError("no further episode")
        self.begun = True
        return self.env.reset(**options)


def test_where_a_reset_fails_what_followed_the_last_row_is_still_known() -> None:
    """The first environment's episode ends after 5 steps; no pole falls as soon as that."""
    makes = [lambda: Unresettable(gym.make("CartPole-v1", max_episode_steps=5)), cartpole]
    envs = SyncVectorEnv(makes, autoreset_mode=AutoresetMode.DISABLED)
    with pytest.raises(RolloutError, match="no further episode") as it:
        single_path(envs, coin, steps=100, seed=0)
    batch = it.value.batch
    assert batch.cut_rows.tolist() == [[4, 0], [4, 1]]
    assert not torch.equal(batch.cut_observations[1], batch.observations[-1, 1])


class Failing(gym.Wrapper[Any, Any, Any, Any]):
    """An environment that dies, or loses count, after so many steps."""

    def __init__(self, env: Env, steps: int, reward: float | None = None) -> None:
        super().__init__(env)
        self.left, self.odd = steps, reward

    def step(self, action: Any) -> Any:
        self.left -= 1
        if self.left < 0 and self.odd is None:
            raise ConnectionError("the simulator is gone")
        observation, reward, *rest = self.env.step(action)
        return (observation, self.odd if self.left < 0 else reward, *rest)


@each_mode
def test_what_came_before_an_environment_died_is_kept(mode: AutoresetMode) -> None:
    envs = vector(lambda: Failing(cartpole(), 20), 2, mode)
    with pytest.raises(
        RolloutError, match=r"Step \d+ .*ConnectionError: the simulator is gone"
    ) as it:
        single_path(envs, coin, steps=100, seed=0)
    batch = it.value.batch
    assert 38 <= int(batch.valid.sum()) <= 42
    assert isinstance(it.value.__cause__, ConnectionError)
    values, following = batch.values(lambda seen: seen[:, 0])
    assert values.shape == following.shape == batch.rewards.shape
    with pytest.raises(RolloutError) as at_once:
        single_path(vector(lambda: Failing(cartpole(), 0), 2), coin, steps=100, seed=0)
    assert at_once.value.batch is None


@pytest.mark.parametrize("reward", [float("nan"), float("inf")])
def test_a_reward_that_is_no_number_is_told_with_its_place(reward: float) -> None:
    envs = vector(lambda: Failing(cartpole(), 20, reward), 2)
    with pytest.raises(RolloutError, match=rf"Environment 0 .* reward {reward} at step 20") as it:
        single_path(envs, coin, steps=30, seed=0)
    assert len(it.value.batch.rewards) == 30


def start(**options: Any) -> Callable[[], object]:
    return lambda: single_path(vector(cartpole), coin, **options)


def collected() -> SinglePathBatch:
    return single_path(vector(cartpole), coin, steps=2, seed=0)


def with_sequences() -> SyncVectorEnv:
    space = gym.spaces.Sequence(gym.spaces.Discrete(3))
    return vector(lambda: wrappers.TransformObservation(cartpole(), lambda seen: (1, 2), space))


REFUSED: dict[str, tuple[Callable[[], object], str]] = {
    "neither steps nor episodes": (start(), "either steps or episodes"),
    "both": (start(steps=1, episodes=1), "either steps or episodes"),
    "no steps": (start(steps=0), "steps is 0; it must be a whole number of at least 1"),
    "no episodes": (start(episodes=-1), "episodes is -1"),
    "after and a seed": (lambda: start(steps=1, after=collected(), seed=1)(), "Leave one of them"),
    "after and episodes": (lambda: start(episodes=1, after=collected())(), "Leave one of them"),
    "one environment": (
        lambda: single_path(cartpole(), coin, steps=1),  # type: ignore[arg-type]  # the mistake
        "got a TimeLimit; it takes vector environments",
    ),
    "a state without its environments": (
        start(steps=1, state=(torch.zeros(1, 3, 4), torch.zeros(3, 4))),
        r"state holds a tensor of shape \(3, 4\); its second dimension must be the \d environments",
    ),
    "another number of environments": (
        lambda: single_path(vector(cartpole, 2), coin, steps=1, after=collected()),
        "after is a rollout of 3 environments, and there are 2 here",
    ),
    "a space without a shape": (
        lambda: single_path(with_sequences(), coin, steps=1),
        "observations hold a Sequence.*Flatten or encode",
    ),
    "actions of another shape": (
        lambda: single_path(
            vector(lambda: gym.make("Pendulum-v1")),
            lambda seen: Independent(Normal(torch.zeros(len(seen), 2), torch.ones(2)), 1),
            steps=1,
        ),
        r"actions have shape \(3, 2\)",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_makes_no_sense_is_refused_by_name(name: str) -> None:
    call, message = REFUSED[name]
    with pytest.raises(TrustRegionError, match=message):
        call()
