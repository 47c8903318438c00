"""The training loop: what it estimates, logs and refuses; and the demo around it."""

from __future__ import annotations

import math
import os
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

import agent
import critic_fit
import demo
import gymnasium as gym
import normaliser
import numpy as np
import pytest
import step_length
import torch
import train
import vine_agent
from checkpoint import load, save
from devices import each_device
from gymnasium.vector import SyncVectorEnv
from ranks import CONTEXT
from small_runs import checkpoint, small
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch.distributions import Independent

from trpo_optim import StepReport, frozen, mean_kl
from trpo_optim.rollouts import discounted_returns
from trpo_optim.rollouts.spaces import actions_for

pytestmark = [
    pytest.mark.learns,
    pytest.mark.filterwarnings("ignore::DeprecationWarning:tensorboard"),
]


@each_device
@pytest.mark.parametrize("mode", ["trpo", "natural", "vanilla"])
@pytest.mark.parametrize("env_id", ["CartPole-v1", "Pendulum-v1"])
def test_it_runs_in_every_mode_on_discrete_and_continuous_actions(
    tmp_path: Path, env_id: str, mode: Any, device: str
) -> None:
    run = train.train(small(tmp_path, env_id=env_id, mode=mode, lr=0.1, device=device))
    assert run.step == 1024
    assert len(run.kls) == 8
    assert (tmp_path / "training.png").stat().st_size > 10_000
    if mode != "vanilla":
        assert all(0 < kl <= 0.011 for _, kl in run.kls)


@pytest.mark.usefixtures("undrawn")
def test_every_field_of_every_report_is_logged(tmp_path: Path) -> None:
    train.train(small(tmp_path))
    events = EventAccumulator(str(tmp_path)).Reload()
    tags = events.Tags()
    logged = {*tags["scalars"], *(tag.removesuffix("/text_summary") for tag in tags["tensors"])}
    for name in StepReport.__dataclass_fields__:
        assert f"report/{name}" in logged
    assert [event.step for event in events.Scalars("report/kl")] == list(range(128, 1025, 128))


@pytest.mark.usefixtures("undrawn")
def test_the_steps_length_falls_linearly(tmp_path: Path) -> None:
    args = small(tmp_path, env_id="Pendulum-v1", max_kl=0.02, anneal_steps=2048)
    kls = [kl for _, kl in train.train(args).kls]
    wanted = [0.02 * (1 - index / 16) ** 2 for index in range(8)]
    assert all(kl <= each * (1 + 1e-4) for kl, each in zip(kls, wanted, strict=True))
    assert kls[-1] > 0.5 * wanted[-1]


@pytest.mark.usefixtures("undrawn")
def test_vanillas_learning_rate_falls_linearly(tmp_path: Path) -> None:
    args = small(tmp_path, mode="vanilla", lr=0.1, anneal_steps=2048)
    (group,) = train.train(args).optimizer.param_groups
    assert group["lr"] == pytest.approx(0.1 * (1 - 7 / 16))  # the eighth step's


@pytest.mark.parametrize(("max_kl", "least"), [(0.02, 2e-6), (1.5e-6, 1.5e-6)])
def test_the_radius_stays_where_single_precision_resolves_it(
    tmp_path: Path, max_kl: float, least: float
) -> None:
    run = train.new_run(small(tmp_path, max_kl=max_kl, anneal_steps=1024))
    for run.update in range(20):
        step_length.set_length(run, torch.ones(4, 2))
    assert run.optimizer.param_groups[0]["max_kl"] == least
    assert train.improve(run, train.collect(run))[0].accepted


def test_the_steps_length_stays_until_anneal_start(tmp_path: Path) -> None:
    args = small(tmp_path, mode="vanilla", lr=0.1, anneal_steps=1280, anneal_start=768)
    lengths = []
    run = train.new_run(args)
    for run.update in range(0, 13, 2):
        step_length.set_length(run, torch.ones(4, 2))
        lengths.append(run.optimizer.param_groups[0]["lr"] / 0.1)
    assert lengths == pytest.approx([1, 1, 1, 1, 0.5, 1e-3, 1e-3])


@pytest.mark.parametrize(("mode", "power"), [("trpo", 2), ("vanilla", 1)])
def test_steps_get_shorter_with_small_advantages(tmp_path: Path, mode: Any, power: int) -> None:
    run = train.new_run(small(tmp_path, mode=mode, max_kl=0.02, lr=0.1, advantage_floor=0.05))
    name = "max_kl" if mode == "trpo" else "lr"
    shares = []
    for spread in (2.0, 0.05, 0.025, 0.005):
        step_length.set_length(run, 7 + spread * torch.tensor([[-1.0, 1.0], [1.0, -1.0]]))
        shares.append(run.optimizer.param_groups[0][name] / run.optimizer.defaults[name])
    root = math.sqrt(4 / 3)  # torch's variance has one observation less
    wanted = [min(1.0, root * share) ** power for share in (1, 1, 0.5, 0.1)]
    assert shares == pytest.approx(wanted, rel=1e-3)


def test_the_policys_lambda_does_not_change_the_length(tmp_path: Path) -> None:
    radii = []
    for gae_lambda in (0.0, 1.0):
        settings = {"advantage_floor": 5.0, "gae_lambda": gae_lambda, "critic_lambda": 0.9}
        run = train.new_run(small(tmp_path, **settings))
        train.improve(run, train.collect(run))
        radii.append(run.optimizer.param_groups[0]["max_kl"])
    assert radii[0] == radii[1] < run.optimizer.defaults["max_kl"]


def test_no_advantages_leave_a_rate(tmp_path: Path) -> None:
    args = small(tmp_path, mode="vanilla", lr=0.1, advantage_floor=0.05, anneal_steps=1024)
    run = train.new_run(args)
    run.update = 7
    step_length.set_length(run, torch.zeros(4, 2))
    assert run.optimizer.param_groups[0]["lr"] == pytest.approx(1e-4)


def test_radius_and_noise_can_go_by_the_number_of_action_dimensions(tmp_path: Path) -> None:
    args = small(tmp_path, env_id="Hopper-v5", max_kl=0.01, per_dimension=True)
    run = train.new_run(args)
    assert run.optimizer.param_groups[0]["max_kl"] == pytest.approx(0.03)
    assert run.policy.log_std.exp().tolist() == pytest.approx([1 / 3] * 3)
    many = train.new_run(replace(args, log_std=2))
    assert many.policy.log_std.exp().tolist() == [1, 1, 1]
    discrete = train.new_run(replace(args, env_id="CartPole-v1"))
    assert discrete.optimizer.param_groups[0]["max_kl"] == pytest.approx(0.01)


def test_bounded_actions_go_from_minus_one_to_one(tmp_path: Path) -> None:
    envs = agent.make_envs(small(tmp_path, env_id="Pendulum-v1"))
    assert envs.single_action_space == gym.spaces.Box(-1, 1, (1,), np.float32)
    plain = gym.make("Pendulum-v1")
    envs.reset(seed=3)
    plain.reset(seed=3)
    seen = envs.step(np.full((4, 1), 0.5, np.float32))[0][0]
    np.testing.assert_allclose(seen, plain.step(np.ones(1, np.float32))[0], rtol=1e-6)


@pytest.mark.usefixtures("undrawn")
def test_the_critic_is_fitted_to_the_last_batches(tmp_path: Path) -> None:
    run = train.train(small(tmp_path, critic_batches=3))
    assert len(run.batches) == 3
    last = train.collect(run)
    kept = run.batches[:2]
    train.improve(run, last)
    assert all(ours is theirs for ours, theirs in zip(run.batches, [last, *kept], strict=True))
    with mock.patch.object(critic_fit, "fit_value") as fit:
        critic_fit.fit_critic(run)
    _, observations, taught, _ = fit.call_args.args
    rows = [batch.flat(batch.observations) for batch in run.batches]
    assert torch.equal(observations, run.normalise(torch.cat(rows)))
    assert torch.equal(taught[128:256], kept[0].flat(critic_fit.targets(run, kept[0])))


def test_the_critic_has_a_lambda_of_its_own(tmp_path: Path) -> None:
    run = train.new_run(small(tmp_path, gae_lambda=0.0, critic_lambda=1.0))
    batch = train.collect(run)
    critic_fit.count_returns(run, batch)
    rewards, (values, following) = batch.rewards / critic_fit.scale(run), batch.values(run.value)
    one_step = rewards + run.args.gamma * following - values
    torch.testing.assert_close(critic_fit.advantages(run, batch, run.args.gae_lambda), one_step)
    returns = discounted_returns(rewards, following, batch.ends, gamma=run.args.gamma)
    torch.testing.assert_close(critic_fit.targets(run, batch), returns, rtol=1e-4, atol=1e-5)


@pytest.mark.usefixtures("undrawn")
def test_the_scaling_moves_the_policy_by_a_tenth_of_the_radius(tmp_path: Path) -> None:
    run = train.train(small(tmp_path, env_id="Pendulum-v1"))
    torch.manual_seed(0)
    observations = 5 + 3 * torch.randn(512, 3)
    run.update, mean, old = 20, run.normalise.mean, frozen(run.act(observations))
    normaliser.follow(run, observations)
    kl = float(mean_kl(old, run.act(observations)).detach())
    assert 0.5e-3 < kl <= 1e-3  # of max_kl, 0.01
    behind = torch.linalg.norm(run.normalise.mean - torch.as_tensor(run.normalise.stats.mean))
    assert 0 < behind < torch.linalg.norm(mean - torch.as_tensor(run.normalise.stats.mean))
    save(run)
    again = train.new_run(run.args)
    load(again)
    assert torch.equal(again.normalise.mean, run.normalise.mean)
    assert torch.equal(again.normalise.scale, run.normalise.scale)
    run.update = 0
    normaliser.follow(run, observations)
    torch.testing.assert_close(
        run.normalise.mean.double(), torch.as_tensor(run.normalise.stats.mean), rtol=1e-6, atol=1e-6
    )


@pytest.mark.usefixtures("undrawn")
def test_a_new_run_keeps_the_earlier_one(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    for _ in range(3):
        train.train(small(folder, total_steps=256))
    names = {path.name for path in tmp_path.iterdir()}
    assert names == {"run", "run.1", "run.2"}
    assert checkpoint(tmp_path / "run.1")["update"] == 2


@pytest.mark.parametrize(
    "space",
    [
        gym.spaces.Discrete(3, start=-1),
        gym.spaces.Discrete(2),
        gym.spaces.Box(-9, 9, (2, 2), np.float32),
        gym.spaces.Box(-9, 9, (3,), np.float32),
    ],
    ids=str,
)
def test_actions_reach_the_environments_in_their_spaces_form(
    space: gym.Space[Any],
) -> None:
    policy = agent.Policy(4, space, train.Args())
    actions = actions_for(space, policy(torch.zeros(200, 4)).sample())
    assert all(space.contains(each) for each in actions)


def test_settings_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match="batch_size 130 must be a multiple of num_envs 4"):
        train.train(replace(small(tmp_path), batch_size=130))
    with pytest.raises(SystemExit, match="at most total_steps 64"):
        train.train(small(tmp_path, total_steps=64))
    for name, args in {
        "num_envs 0": replace(small(tmp_path), num_envs=0),
        "checkpoint_every 0": replace(small(tmp_path), checkpoint_every=0),
    }.items():
        with pytest.raises(SystemExit, match=name):
            train.train(args)
    for start, steps in ((512, 512), (512, None), (-1, 512)):
        message = f"anneal_start {start} must be at least 0 and before anneal_steps {steps}"
        with pytest.raises(SystemExit, match=message):
            train.train(small(tmp_path, anneal_start=start, anneal_steps=steps))


def test_an_action_space_that_the_loop_does_not_know_is_refused_by_name() -> None:
    space = gym.spaces.MultiDiscrete([2, 3])
    with pytest.raises(SystemExit, match=r"MultiDiscrete\(\[2 3\]\)"):
        agent.Policy(4, space, train.Args())
    envs = SyncVectorEnv([lambda: gym.make("CartPole-v1")])
    envs.single_action_space = space
    with pytest.raises(SystemExit, match=r"MultiDiscrete\(\[2 3\]\)"):
        vine_agent.Agent(envs)


def test_continuous_actions_are_one_joint_distribution() -> None:
    space = gym.spaces.Box(-1, 1, (17,), np.float32)
    dist = agent.Policy(4, space, train.Args())(torch.zeros(5, 4))
    assert isinstance(dist, Independent)
    assert torch.distributions.kl_divergence(dist, dist).shape == (5,)


def test_rewards_are_scaled_by_the_spread_of_the_returns_so_far(tmp_path: Path) -> None:
    run = train.new_run(small(tmp_path, env_id="Pendulum-v1", gamma=0.9))
    returns, rows = np.zeros(4), []
    for _ in range(8):
        batch = train.collect(run)
        critic_fit.count_returns(run, batch)
        ends = (batch.terminated | batch.truncated).numpy()
        for reward, end in zip(batch.rewards.numpy(), ends, strict=True):
            returns = 0.9 * returns + reward
            rows.append(returns)
            returns = returns * ~end
        run.update += 1
    assert any(end.any() for end in ends) or run.episodes  # episodes of 200 steps end on the way
    spread = float(np.concatenate(rows).std())
    assert critic_fit.scale(run) == pytest.approx(spread, rel=1e-3)


def test_the_demo_compares_the_modes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(os, "cpu_count", lambda: 1)  # of processes, which take longer than the runs
    monkeypatch.setattr(demo, "get_context", lambda _: CONTEXT)  # and longer still without torch
    monkeypatch.setenv("TQDM_DISABLE", "1")  # as the demo sets it, but to be undone
    demo.main(seeds=1, total_steps=2048, picture=tmp_path / "new" / "demo.png")
    rows = [line.split() for line in capsys.readouterr().out.splitlines() if line.startswith("|")]
    assert [row[1] for row in rows] == ["mode", "---", "trpo", "natural", "vanilla"]
    assert (tmp_path / "new" / "demo.png").stat().st_size > 10_000
