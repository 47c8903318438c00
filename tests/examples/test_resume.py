"""Training runs that were stopped or killed go on as if they had not been."""

from __future__ import annotations

import os
import random
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
import torch
import train
from checkpoint import load, save
from devices import each_device
from profiles import problems
from small_runs import checkpoint, small
from torch import Tensor

SCRIPT = Path(train.__file__)

pytestmark = [
    pytest.mark.learns,
    pytest.mark.usefixtures("undrawn"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning:tensorboard"),
]


def command(args: train.Args, *extra: str) -> list[str]:
    flags = [
        "--run-dir",
        str(args.run_dir),
        "--env-id",
        args.env_id,
        "--batch-size",
        str(args.batch_size),
    ]
    flags += ["--num-envs", str(args.num_envs), "--critic-epochs", str(args.critic_epochs)]
    flags += ["--checkpoint-every", "1", "--total-steps", str(args.total_steps)]
    return [sys.executable, str(SCRIPT), *flags, *extra]


def without_pickles(content: dict[str, Any]) -> dict[str, Any]:
    """The checkpoint but for the environments, which hold no numbers of the run."""
    parts = [
        {name: value for name, value in part.items() if name != "environments"}
        for part in content["processes"]
    ]
    return {**content, "processes": parts}


def same(left: Any, right: Any) -> bool:
    """Compare nested containers bit for bit."""
    if isinstance(left, Tensor):
        return torch.equal(left, right)
    if isinstance(left, dict):
        return left.keys() == right.keys() and all(same(left[key], right[key]) for key in left)
    if isinstance(left, list | tuple):
        return len(left) == len(right) and all(map(same, left, right))
    return bool(left == right)


def test_a_resumed_run_holds_what_was_saved_bit_for_bit(tmp_path: Path) -> None:
    train.train(small(tmp_path))
    saved = checkpoint(tmp_path)
    run = train.new_run(small(tmp_path, resume=True))
    torch.manual_seed(123)
    load(run)
    shutil.move(tmp_path / "checkpoint.pt", tmp_path / "first.pt")
    save(run)
    assert same(without_pickles(checkpoint(tmp_path)), without_pickles(saved))
    assert saved["update"] == 8


@each_device
@pytest.mark.parametrize(
    "env_id",
    [pytest.param("CartPole-v1", marks=pytest.mark.thorough), "Hopper-v5", "LunarLander-v3"],
)
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_a_resumed_run_ends_with_the_numbers_of_one_that_never_stopped(
    tmp_path: Path, env_id: str, device: str
) -> None:
    changes: dict[str, Any] = {"env_id": env_id, "critic_batches": 2, "anneal_steps": 2048}
    changes["device"] = device
    train.train(small(tmp_path / "whole", **changes, total_steps=640))
    for total_steps in (128, 384, 640):
        train.train(small(tmp_path / "parts", **changes, resume=True, total_steps=total_steps))
    whole, parts = checkpoint(tmp_path / "whole"), checkpoint(tmp_path / "parts")
    assert whole["update"] == 5
    assert same(without_pickles(whole), without_pickles(parts))


@pytest.mark.parametrize(
    "changes",
    [
        {"reuse": 1, "reuse_weight": 0.5},
        {"critic_batches": 2},
        {"advantage_floor": 10.0},
    ],
    ids=["earlier batch", "critic's batches", "advantage floor"],
)
def test_a_resumed_run_goes_on_with_every_option(tmp_path: Path, changes: dict[str, Any]) -> None:
    changes = {"env_id": "Pendulum-v1", **changes}
    train.train(small(tmp_path / "whole", **changes, total_steps=512))
    for total_steps in (256, 512):
        train.train(small(tmp_path / "parts", **changes, resume=True, total_steps=total_steps))
    whole, parts = checkpoint(tmp_path / "whole"), checkpoint(tmp_path / "parts")
    assert same(without_pickles(whole), without_pickles(parts))
    for name in changes.keys() - {"env_id"}:
        without = {key: value for key, value in changes.items() if key != name}
        train.train(small(tmp_path / name, **without, total_steps=512))
        assert not same(checkpoint(tmp_path / name)["critic"], whole["critic"]), name


@pytest.mark.parametrize("env_id", ["CartPole-v1", "Hopper-v5"])
def test_a_resumed_run_uses_the_same_earlier_batches_again(tmp_path: Path, env_id: str) -> None:
    changes: dict[str, Any] = {"env_id": env_id, "reuse": 2}
    train.train(small(tmp_path / "whole", **changes, total_steps=640))
    for total_steps in (128, 384, 640):
        train.train(small(tmp_path / "parts", **changes, resume=True, total_steps=total_steps))
    train.train(small(tmp_path / "without", env_id=env_id, total_steps=640))
    whole, parts = checkpoint(tmp_path / "whole"), checkpoint(tmp_path / "parts")
    assert len(whole["processes"][0]["batches"]) == 3
    assert same(without_pickles(whole), without_pickles(parts))
    assert not same(checkpoint(tmp_path / "without")["kls"], whole["kls"])


class Astray(gym.Wrapper[Any, Any, Any, Any]):
    """Draws from a generator that no reset seeds, and that nobody can copy."""

    def __init__(self, env: gym.Env[Any, Any]) -> None:
        super().__init__(env)
        self.noise = iter(np.random.default_rng().normal, None)

    def step(self, action: Any) -> Any:
        observation, *rest = self.env.step(action)
        return (observation + np.float32(1e-3 * next(self.noise)), *rest)


def test_environments_that_do_not_return_to_their_state_start_new_episodes(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    gym.register("Astray-v0", lambda **_: Astray(gym.make("CartPole-v1")))
    for total_steps in (512, 1024):
        train.train(small(tmp_path, env_id="Astray-v0", resume=True, total_steps=total_steps))
    assert "Astray-v0 starts new episodes" in capsys.readouterr().out
    assert checkpoint(tmp_path)["update"] == 8


def test_a_resumption_has_seen_every_batch(tmp_path: Path) -> None:
    train.train(small(tmp_path, total_steps=512))
    run = train.train(small(tmp_path, resume=True))
    assert run.normalise.stats.count == pytest.approx(1024, abs=1)
    assert run.return_stats.count == pytest.approx(1024, abs=1)


def test_killed_at_any_moment_and_resumed_it_ends_as_if_it_had_never_stopped(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    args = small(tmp_path / "killed", env_id="Hopper-v5", total_steps=128 * 400)
    reached = 0
    moments = random.Random(0)
    for _ in range(problems(share=0.01)):
        process = subprocess.Popen(
            command(args, "--resume"), stderr=subprocess.DEVNULL, start_new_session=True
        )
        deadline = time.monotonic() + 120
        while time.monotonic() < deadline and process.poll() is None:
            path = tmp_path / "killed" / "checkpoint.pt"
            if path.exists() and checkpoint(tmp_path / "killed")["update"] > reached + 2:
                break
            time.sleep(0.02)
        time.sleep(moments.uniform(0.0, 0.25))
        assert process.poll() is None, "it ended before it could be killed"
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        content = checkpoint(tmp_path / "killed")
        assert content["update"] > reached
        assert len(content["kls"]) == content["update"]
        reached = content["update"]
    final = replace(args, total_steps=128 * (reached + 2))
    train.train(replace(final, resume=True))
    assert "mean return of the last 20 episodes" in capfd.readouterr().out
    train.train(replace(final, run_dir=tmp_path / "whole"))
    killed, whole = checkpoint(tmp_path / "killed"), checkpoint(tmp_path / "whole")
    assert killed["update"] == reached + 2
    assert same(without_pickles(killed), without_pickles(whole))


def test_a_half_written_checkpoint_is_never_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    train.train(small(tmp_path, total_steps=512))
    before = (tmp_path / "checkpoint.pt").read_bytes()
    run = train.new_run(small(tmp_path, resume=True))
    load(run)

    def half_a_save(content: object, file: Any) -> None:
        file.write(before[: len(before) // 2])
        raise OSError("disk full")

    monkeypatch.setattr(torch, "save", half_a_save)
    with pytest.raises(OSError, match="disk full"):
        save(run)
    monkeypatch.undo()
    assert (tmp_path / "checkpoint.pt").read_bytes() == before
    train.train(small(tmp_path, resume=True))
    assert checkpoint(tmp_path)["update"] == 8


def test_without_a_checkpoint_resume_starts_at_the_beginning(tmp_path: Path) -> None:
    train.train(small(tmp_path, resume=True, total_steps=256))
    assert checkpoint(tmp_path)["update"] == 2


def test_resuming_with_other_settings_is_refused_by_name(tmp_path: Path) -> None:
    train.train(small(tmp_path, total_steps=256))
    with pytest.raises(SystemExit, match=r"max_kl 0\.01 -> 0\.5"):
        train.train(small(tmp_path, resume=True, max_kl=0.5))


def test_a_checkpoint_from_before_a_setting_goes_on_where_that_has_its_default(
    tmp_path: Path,
) -> None:
    train.train(small(tmp_path, total_steps=256))
    content = checkpoint(tmp_path)
    del content["args"]["critic_batches"]
    torch.save(content, tmp_path / "checkpoint.pt")
    assert train.train(small(tmp_path, resume=True)).step == 1024
    torch.save(content, tmp_path / "checkpoint.pt")
    with pytest.raises(SystemExit, match="critic_batches 1 -> 2"):
        train.train(small(tmp_path, resume=True, critic_batches=2))
