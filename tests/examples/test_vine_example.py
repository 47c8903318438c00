"""The example that trains by vine: it learns, and runs on every kind of environment it names."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import vine as example
from devices import each_device

pytestmark = pytest.mark.learns


def last(args: example.Args) -> float:
    return example.train(args).recent_return()


@pytest.mark.parametrize(("sampling", "steps"), [("vine", 14_000), ("single-path", 9_000)])
def test_the_pole_stands_longer_after_a_few_updates(sampling: Any, steps: int) -> None:
    args = example.Args(sampling=sampling, total_steps=steps, max_kl=0.03, critic_epochs=10)
    assert last(args) > 100  # at random: 20


@each_device
@pytest.mark.parametrize("sampling", ["vine", "single-path"])
@pytest.mark.parametrize("env_id", ["Swimmer-v5", "ALE/Pong-v5"])
def test_it_runs_on_continuous_actions_and_on_frames(
    env_id: str, sampling: Any, device: str, capsys: pytest.CaptureFixture[str]
) -> None:
    args = example.Args(env_id=env_id, sampling=sampling, num_envs=2, trunk_steps=8, states=4)
    args = replace(args, horizon=2, critic_epochs=2, total_steps=100, device=device)
    run = example.train(args)
    assert all(each.device.type == device for each in run.agent.parameters())
    assert run.episodes == []  # they are longer
    said = capsys.readouterr().out
    assert f"{env_id} {sampling} seed 0" in said
    assert "simulator steps, 0 episodes" in said


def same(first: example.Run, second: example.Run) -> bool:
    """Return whether two runs came to the same networks by the same episodes."""
    pairs = zip(first.agent.parameters(), second.agent.parameters(), strict=True)
    equal = all(torch.equal(ours, theirs) for ours, theirs in pairs)
    return equal and (first.steps, first.episodes) == (second.steps, second.episodes)


def test_two_runs_of_one_seed_agree() -> None:
    args = example.Args(total_steps=3_000)
    assert same(example.train(args), example.train(args))


@each_device
@pytest.mark.parametrize(
    ("env_id", "sampling"),
    [
        ("CartPole-v1", "vine"),
        ("Swimmer-v5", "single-path"),
        ("ALE/Pong-v5", "vine"),
        pytest.param("CartPole-v1", "single-path", marks=pytest.mark.thorough),
        pytest.param("Swimmer-v5", "vine", marks=pytest.mark.thorough),
        pytest.param("ALE/Pong-v5", "single-path", marks=pytest.mark.thorough),
    ],
)
def test_a_run_goes_on_from_its_checkpoint_as_if_it_had_never_stopped(
    env_id: str, sampling: Any, device: str, tmp_path: Path
) -> None:
    if (env_id, device) == ("ALE/Pong-v5", "cuda"):
        pytest.skip("cuDNN's convolutions do not give the same gradients twice")
    args = example.Args(
        env_id=env_id,
        sampling=sampling,
        total_steps=300,
        num_envs=2,
        trunk_steps=16,
        states=4,
        horizon=4,
        critic_epochs=2,
        device=device,
    )
    kept = replace(args, checkpoint=tmp_path / "run.pt")
    half = example.train(replace(kept, total_steps=100))
    assert 100 <= half.steps < 300
    whole = example.train(args)
    assert not same(half, whole)
    assert same(example.train(kept), whole)


def test_a_checkpoint_of_other_settings_is_refused(tmp_path: Path) -> None:
    args = example.Args(total_steps=100, num_envs=2, checkpoint=tmp_path / "run.pt")
    example.train(args)
    with pytest.raises(
        SystemExit, match=r"run\.pt was made with other settings \(max_kl 0\.01 -> "
    ):
        example.train(replace(args, max_kl=0.02))
