"""Vine: its estimates against exact values, its variance, and where it leaves the environments."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
import torch
from devices import each_device
from gymnasium.vector import SyncVectorEnv
from tabular import table, tabular
from torch import Tensor, nn
from torch.distributions import Categorical, Distribution, Independent, Normal

from trpo_optim import TrustRegionError, TrustRegionOptimizer
from trpo_optim.rollouts import (
    RolloutError,
    VineBatch,
    capture,
    discounted_returns,
    policy_closure,
    restore,
    single_path,
    vine,
    vine_closure,
)

GAMMA = 0.9


def lake() -> gym.Env[int, int]:
    return gym.make("FrozenLake-v1", is_slippery=True, max_episode_steps=100_000)


def lakes(count: int = 16) -> SyncVectorEnv:
    return SyncVectorEnv([lake] * count, autoreset_mode="SameStep")


class Table(nn.Module):
    """A policy by one logit for every state and action."""

    def __init__(self, seed: int = 0) -> None:
        super().__init__()
        noise = torch.Generator().manual_seed(seed)
        self.logits = nn.Parameter(torch.randn(16, 4, generator=noise))

    def forward(self, states: Tensor) -> Categorical:
        return Categorical(logits=self.logits[states])


class Swing(nn.Module):
    """A fixed random controller of the pendulum, with noise."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.network = nn.Sequential(nn.Linear(3, 16), nn.Tanh(), nn.Linear(16, 1))

    def forward(self, seen: Tensor) -> Distribution:
        return Independent(Normal(self.network(seen), torch.ones(1).to(seen)), 1)


def pendulums() -> SyncVectorEnv:
    return SyncVectorEnv([lambda: gym.make("Pendulum-v1")] * 8, autoreset_mode="SameStep")


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
        states=600,
        horizon=horizon,
        gamma=GAMMA,
        critic=None if horizon == 200 else lambda states: values[states],
        common_random_numbers=common,
        seed=0,
    )
    off = batch.q.double() - exact[batch.observations]
    assert batch.q.shape == (600, 4)
    for action in range(4):
        error = float(off[:, action].std()) / math.sqrt(len(off))
        assert abs(float(off[:, action].mean())) < 4 * error + 1e-6
    near = torch.tensor([0, 1, 4])
    spread = float(off[torch.isin(batch.observations, near)].mean(1).std())  # rewards are rare
    for state in near:
        here = off[batch.observations == state].mean(1)
        assert abs(float(here.mean())) < 4 * spread / math.sqrt(len(here)) + 1e-6


def gradient(policy: nn.Module, loss: Tensor) -> Tensor:
    slopes = torch.autograd.grad(loss, list(policy.parameters()))
    return torch.cat([each.reshape(-1) for each in slopes])


@pytest.mark.no_cover
def test_common_random_numbers_make_differences_more_certain() -> None:
    """Two actions of the policy from the same state, over many such pairs."""
    envs, policy = pendulums(), Swing()

    torch.manual_seed(0)
    both: dict[bool, list[Tensor]] = {True: [], False: []}
    for seed in range(3):
        for common, found in both.items():
            batch = vine(
                envs,
                policy,
                steps=8,
                states=64,
                branches=2,
                horizon=30,
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


@pytest.mark.no_cover
@pytest.mark.parametrize(
    ("make", "policy", "branches"), [(cartpoles, Balance(), None), (pendulums, Swing(), 4)]
)
def test_per_sample_the_gradient_varies_less_than_single_paths(
    make: Callable[[], SyncVectorEnv], policy: nn.Module, branches: int | None
) -> None:
    """Section 5.2: for the same number of Q-values in the objective, 128."""
    torch.manual_seed(0)
    envs = make()
    found: dict[str, list[Tensor]] = {"vine": [], "path": []}
    for seed in range(8):
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


def test_trying_all_actions_is_equation_15() -> None:
    torch.manual_seed(0)
    policy = Table()
    batch = vine(lakes(4), policy, steps=20, states=30, horizon=20, gamma=GAMMA, seed=0)
    assert batch.sampling_log_prob is None
    assert batch.actions.tolist() == [[0, 1, 2, 3]] * 30
    old = gradient(policy, -(policy(batch.observations).probs * batch.q).sum(1).mean())
    closure = vine_closure(policy, batch)
    torch.testing.assert_close(gradient(policy, closure()[0]), old)
    with torch.no_grad():
        before = (policy(batch.observations).probs * batch.q).sum(1).mean()
        policy.logits.add_(torch.randn_like(policy.logits))
        after = (policy(batch.observations).probs * batch.q).sum(1).mean()
    torch.testing.assert_close(closure()[0].detach(), before - after)


@pytest.mark.parametrize("sampling", ["policy", "uniform"])
def test_trying_some_actions_is_equation_16(sampling: Any) -> None:
    torch.manual_seed(0)
    policy = Table()
    batch = vine(
        lakes(4),
        policy,
        steps=20,
        states=30,
        branches=3,
        sampling=sampling,
        horizon=20,
        gamma=GAMMA,
        seed=0,
    )
    assert batch.q.shape == batch.actions.shape == (30, 3)
    if sampling == "uniform":
        assert batch.sampling_log_prob is not None
        assert torch.equal(batch.sampling_log_prob, torch.full((30, 3), -math.log(4)))

    def objective() -> Tensor:
        logs = torch.log_softmax(policy.logits, 1)[batch.observations].gather(1, batch.actions)
        assert batch.sampling_log_prob is not None
        ratio = (logs - batch.sampling_log_prob).exp()
        return ((ratio * batch.q).sum(1) / ratio.sum(1)).mean()

    closure = vine_closure(policy, batch)
    torch.testing.assert_close(
        gradient(policy, closure()[0]), gradient(policy, -objective()), rtol=1e-3, atol=1e-7
    )
    with torch.no_grad():
        before = objective()
        policy.logits.add_(torch.randn_like(policy.logits))
        torch.testing.assert_close(closure()[0], before - objective(), rtol=1e-3, atol=1e-6)


@each_device
def test_the_step_is_held_over_the_whole_trunk(device: str) -> None:
    policy, envs = Swing().to(device), pendulums()
    batch = vine(
        envs,
        policy,
        steps=25,
        states=20,
        branches=4,
        horizon=10,
        gamma=0.97,
        critic=lambda seen: seen.sum(1),
        seed=0,
        device=device,
    )
    closure = vine_closure(policy, batch, entropy_bonus=0.01)
    loss, kl, _ = closure()  # type: ignore[misc]  # with a distribution
    assert kl.shape == (200,)
    report = TrustRegionOptimizer(policy.parameters(), constraint="max").step(closure)
    assert report.accepted
    assert report.engine == "Gauss-Newton"
    assert report.largest_kl <= 0.01
    assert report.loss_before == pytest.approx(float(loss.detach()), abs=1e-6)


def test_curvature_is_taken_on_a_share_of_the_trunk() -> None:
    policy, envs = Swing(), pendulums()
    batch = vine(envs, policy, steps=25, states=20, branches=4, horizon=10, gamma=0.97, seed=0)
    whole = vine_closure(policy, batch)
    built = vine_closure(policy, batch, curvature=0.1, generator=torch.Generator().manual_seed(3))
    assert whole.curvature is None
    assert built.curvature is not None
    rows = torch.randperm(200, generator=torch.Generator().manual_seed(3))[:20].sort().values
    with torch.no_grad():
        for parameter in policy.parameters():
            parameter.add_(0.1)
        kl = built()[1]
        assert kl.shape == (200,)
        torch.testing.assert_close(built.curvature()[1], kl[rows])
        for parameter in policy.parameters():
            parameter.sub_(0.1)
    assert TrustRegionOptimizer(policy.parameters()).step(built).accepted
    with pytest.raises(TrustRegionError, match=r"curvature is 0; it must be a share in \(0, 1\)"):
        vine_closure(policy, batch, curvature=0)


def test_the_environments_are_left_where_the_trunk_ended() -> None:
    policy, envs, others = Swing(), pendulums(), pendulums()
    torch.manual_seed(0)
    plain = single_path(others, policy, steps=15, seed=0)
    state = torch.get_rng_state()
    after_plain = single_path(others, policy, steps=15, after=plain)
    torch.manual_seed(0)
    batch = vine(
        envs,
        policy,
        steps=15,
        states=lambda step, cursor: np.arange(8) == step,
        branches=2,
        horizon=9,
        gamma=0.97,
        seed=0,
    )
    assert batch.q.shape == (8, 2)
    assert batch.steps == 15 * 8 + 8 * 2 * 9
    torch.testing.assert_close(batch.observations, batch.trunk.observations[range(8), range(8)])
    torch.set_rng_state(state)
    end = capture(envs)
    after_vine = single_path(envs, policy, steps=15, after=batch.trunk)
    assert torch.equal(batch.trunk.observations, plain.observations)
    assert torch.equal(after_vine.observations, after_plain.observations)
    assert torch.equal(after_vine.rewards, after_plain.rewards)
    restore(envs, end)
    torch.set_rng_state(state)
    again = vine(envs, policy, steps=15, states=9, branches=2, horizon=2, gamma=0.97, after=batch)
    assert torch.equal(again.trunk.observations[0], after_plain.observations[0])


def test_a_branch_stops_where_its_episode_does() -> None:
    """Every branch of CartPole returns how long the pole stood, counted from the state on."""
    torch.manual_seed(0)
    envs = SyncVectorEnv([lambda: gym.make("CartPole-v1")] * 4, autoreset_mode="NextStep")
    policy = lambda seen: Categorical(logits=torch.tensor([9.0, -9.0]).expand(len(seen), 2))  # noqa: E731
    batch = vine(envs, policy, steps=30, states=40, horizon=100, gamma=1.0, seed=0)
    assert batch.q.max() <= 12
    assert batch.q[:, 0].min() >= 1
    branch_steps = batch.steps - int(batch.trunk.valid.sum())
    assert branch_steps == int(batch.q.sum())


class Noisy(gym.Wrapper[Any, Any, Any, Any]):
    """Rewards with the environment's own random numbers, and ends after four steps."""

    def step(self, action: Any) -> Any:
        observation, _, *rest = self.env.step(action)
        return (observation, float(self.unwrapped.np_random.normal()), *rest)


@pytest.mark.parametrize("common", [True, False])
def test_branches_of_one_action_differ_by_their_random_numbers_alone(*, common: bool) -> None:
    torch.manual_seed(0)
    envs = SyncVectorEnv([lambda: Noisy(gym.make("CartPole-v1"))] * 4, autoreset_mode="SameStep")
    batch = vine(
        envs,
        lambda seen: Categorical(logits=torch.tensor([60.0, 0.0]).expand(len(seen), 2)),
        steps=5,
        states=10,
        branches=3,
        horizon=1,
        gamma=1.0,
        common_random_numbers=common,
        seed=0,
    )
    spread = batch.q.std(1)
    assert (spread == 0).all() if common else (spread > 0).all()
    assert len(batch.q[:, 0].unique()) == 10  # no two states have the same


def test_a_branch_that_is_cut_off_is_worth_what_the_critic_says_of_the_rest() -> None:
    envs = SyncVectorEnv([lambda: gym.make("Pendulum-v1", max_episode_steps=4)] * 2)
    batch = vine(
        envs,
        Swing(),
        steps=1,
        states=lambda step, cursor: np.array([True, True]),
        branches=2,
        horizon=9,
        gamma=0.5,
        critic=lambda seen: torch.full((len(seen),), 1000.0),
        seed=0,
    )
    rewards = batch.q - 0.5**4 * 1000.0
    assert (rewards <= 0).all()
    assert (rewards > -16.3 * 2).all()  # the reward's smallest, four times


def test_a_critic_has_no_say_where_an_episode_ended() -> None:
    torch.manual_seed(0)
    batch = vine(
        lakes(4),
        Table(),
        steps=20,
        states=20,
        horizon=200,
        gamma=GAMMA,
        critic=lambda states: torch.full((len(states),), math.inf),
        seed=0,
    )
    assert batch.q.isfinite().all()


def test_a_branch_is_run_in_the_environment_that_its_state_is_of() -> None:
    torch.manual_seed(0)
    make = partial(gym.make, "FrozenLake-v1", is_slippery=False)
    envs = SyncVectorEnv(
        [partial(make, desc=["SG", "HH"]), partial(make, desc=["SH", "GH"])],
        autoreset_mode="SameStep",
    )
    batch = vine(
        envs,
        Table(),
        steps=3,
        states=lambda step, cursor: np.array([step != 1, True]),
        horizon=1,
        gamma=1.0,
        seed=0,
    )
    right, down = [0.0, 0.0, 1.0, 0.0], [0.0, 1.0, 0.0, 0.0]  # where each has its goal
    assert sorted(batch.q.tolist()) == [right] * 2 + [down] * 3
    assert batch.q[:2].tolist() == [right, down]  # side by side


def test_branches_leave_torchs_random_state_alone() -> None:
    draws = []
    for horizon in (1, 5):
        torch.manual_seed(0)
        vine(
            pendulums(),
            Swing(),
            steps=2,
            states=3,
            branches=2,
            horizon=horizon,
            gamma=0.9,
            seed=0,
        )
        draws.append(torch.rand(1))
    assert torch.equal(*draws)


def test_an_entropy_bonus_counts_in_the_loss() -> None:
    torch.manual_seed(0)
    policy = Table()
    batch = vine(lakes(4), policy, steps=5, states=5, horizon=5, gamma=GAMMA, seed=0)
    plain, with_bonus = (
        float(vine_closure(policy, batch, entropy_bonus=bonus)()[0].detach())
        for bonus in (0.0, 2.0)
    )
    nats = float(policy(batch.observations).entropy().mean().detach())
    assert with_bonus == pytest.approx(plain - 2.0 * nats, abs=1e-5)


class Dying(gym.Wrapper[Any, Any, Any, Any]):
    """An environment that is gone after so many steps, or rewards with NaN from then on."""

    def __init__(self, env: gym.Env[Any, Any], steps: list[int], odd: bool) -> None:
        super().__init__(env)
        self.steps, self.odd = steps, odd

    def step(self, action: Any) -> Any:
        left = next(COUNTER)
        observation, reward, *rest = self.env.step(action)
        if left > self.steps[0] and not self.odd:
            raise ConnectionError("gone")
        return (observation, math.nan if left > self.steps[0] else reward, *rest)


COUNTER = iter(range(10**9))


@pytest.mark.parametrize("odd", [False, True])
def test_states_that_were_finished_are_kept_when_an_environment_dies(*, odd: bool) -> None:
    global COUNTER
    COUNTER = iter(range(10**9))
    envs = SyncVectorEnv(
        [lambda: Dying(gym.make("Pendulum-v1"), [200], odd)] * 2, autoreset_mode="SameStep"
    )
    policy = Swing()
    with pytest.raises(RolloutError, match="A branch failed") as caught:
        vine(envs, policy, steps=20, states=40, branches=2, horizon=3, gamma=GAMMA, seed=0)
    batch = caught.value.batch
    assert isinstance(batch, VineBatch)
    assert 0 < len(batch.q) < 40
    assert len(batch.q) == len(batch.observations) == len(batch.actions)
    assert batch.trunk.rewards.shape == (20, 2)
    assert TrustRegionOptimizer(policy.parameters()).step(vine_closure(policy, batch)).accepted
    for env, seen in zip(envs.envs, batch.trunk.end.observations, strict=True):
        angle = env.unwrapped.state[0]  # type: ignore[attr-defined]  # the pendulum's
        assert math.cos(angle) == pytest.approx(seen[0], abs=1e-6)  # back where the trunk ended


def growing(
    make: Callable[[], Any] = lakes, policy: Any = None, **options: Any
) -> Callable[[], object]:
    chosen = {"steps": 2, "states": 2, "horizon": 2, "gamma": 0.9, "seed": 0, **options}
    return lambda: vine(make(), policy or Table(), **chosen)


def odd_q(value: float) -> Callable[[], object]:
    def call() -> object:
        batch = vine(lakes(2), Table(), steps=2, states=2, horizon=2, gamma=0.9, seed=0)
        batch.q[:] = value
        return vine_closure(Table(), batch)

    return call


REFUSED: dict[str, tuple[Callable[[], object], str]] = {
    "zero branches": (growing(branches=0), "branches is 0; it must be a whole number of at least"),
    "one branch": (growing(branches=1), "branches is 1; it must be at least 2"),
    "zero states": (growing(states=0), "states is 0"),
    "zero steps": (growing(steps=0), "steps is 0"),
    "no horizon": (growing(horizon=0), "horizon is 0"),
    "γ": (growing(gamma=1.5), r"gamma is 1.5; it must be in \[0, 1\]"),
    "another sampling": (growing(branches=2, sampling="greedy"), "sampling is 'greedy'"),
    "more states than rows": (growing(states=33), "states is 33, and the trunk has 32 rows"),
    "half a step": (growing(horizon=2.5), "horizon is 2.5; it must be a whole number"),
    "a rule that returns places": (
        growing(states=lambda step, cursor: np.array([0, 1])),
        r"rule returned array\(\[0, 1\]\); it must be an array of 16 bools",
    ),
    "alike without a number": (growing(sampling="uniform"), "give their number as branches"),
    "a policy of more actions": (
        lambda: vine_closure(
            lambda seen: Categorical(torch.ones(len(seen), 5)),
            vine(lakes(2), Table(), steps=2, states=2, horizon=2, gamma=0.9, seed=0),
        ),
        "do not sum to 1.*than the 4 that were tried",
    ),
    "all of a continuum": (growing(pendulums, Swing()), "not all can be tried"),
    "alike in a continuum": (
        growing(pendulums, Swing(), branches=2, sampling="uniform"),
        "not all can be tried, nor drawn alike",
    ),
    "vector wrappers": (
        growing(lambda: gym.wrappers.vector.RecordEpisodeStatistics(lakes(2))),
        "got a RecordEpisodeStatistics.*SyncVectorEnv",
    ),
    "a rule that takes none": (
        growing(states=lambda step, cursor: np.zeros(16, dtype=bool)),
        "No state of the trunk was taken",
    ),
    "an environment without a state": (
        growing(
            lambda: SyncVectorEnv([lambda: gym.make("LunarLander-v3")] * 2),
            lambda seen: Categorical(torch.ones(2, 4)),
        ),
        "cannot be captured.*LunarLander",
    ),
    "NaN Q": (odd_q(math.nan), "Q holds NaN"),
    "a batch of another kind": (
        lambda: vine_closure(Table(), single_path(lakes(2), Table(), steps=2)),  # type: ignore[arg-type]  # the mistake
        "got a SinglePathBatch; it takes what vine",
    ),
    "actions that the policy rules out": (
        lambda: vine_closure(
            lambda seen: Categorical(logits=torch.tensor([0.0, -math.inf]).expand(len(seen), 2)),
            replace(
                vine(lakes(2), Table(), steps=2, states=2, horizon=2, gamma=0.9, branches=2),
                actions=torch.ones(2, 2, dtype=torch.long),
            ),
        ),
        "rules out all the actions that were tried.*sampling='policy'",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_what_makes_no_sense_is_refused_by_name(name: str) -> None:
    call, message = REFUSED[name]
    with pytest.raises(TrustRegionError, match=message):
        call()
