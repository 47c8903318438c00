"""The example that trains by vine: it learns, and runs on every kind of environment it names."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import vine as example


def last(args: example.Args) -> float:
    return float(np.mean([value for _, value in example.train(args)[-20:]]))


@pytest.mark.no_cover
@pytest.mark.parametrize("sampling", ["vine", "single-path"])
def test_the_pole_stands_longer_after_a_few_updates(sampling: Any) -> None:
    args = example.Args(sampling=sampling, total_steps=60_000)
    assert last(args) > 100  # at random: 20


@pytest.mark.parametrize("sampling", ["vine", "single-path"])
@pytest.mark.parametrize("env_id", ["Swimmer-v5", "ALE/Pong-v5"])
def test_it_runs_on_continuous_actions_and_on_frames(
    env_id: str, sampling: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    args = example.Args(env_id=env_id, sampling=sampling, num_envs=2, trunk_steps=8, states=4)
    episodes = example.train(replace(args, horizon=2, critic_epochs=2, total_steps=100))
    assert episodes == []  # they are longer
    said = capsys.readouterr().out
    assert f"{env_id} {sampling} seed 0" in said
    assert "simulator steps, 0 episodes" in said


def test_two_runs_of_one_seed_agree() -> None:
    args = example.Args(total_steps=5_000)
    assert example.train(args) == example.train(args)
