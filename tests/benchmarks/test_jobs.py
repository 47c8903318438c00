"""The jobs of the learning benchmark: lines of other settings or lengths are refused."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from jobs import CLASSIC_TASKS, MUJOCO_TASKS, SB3, SETTINGS, Job, changes_of


def job(folder: Path, algorithm: str = "trpo", env_id: str = "CartPole-v1") -> Job:
    return Job(env_id, algorithm, 0, folder, 10)


def write(job: Job, steps: list[int], changes: dict[str, Any] | None = None) -> None:
    settings = {**job.settings(), **(changes or {})}
    lines = [json.dumps({"steps": each, "settings": settings}) for each in steps]
    job.lines.write_text("\n".join(lines) + "\n")


@pytest.mark.parametrize("algorithm", ["trpo", "natural", "vanilla", "sb3-contrib"])
def test_finished_pieces_are_counted(tmp_path: Path, algorithm: str) -> None:
    own = job(tmp_path, algorithm)
    assert own.done() == 0
    write(own, [9216, 19456, 30720])  # as whole updates come out
    assert own.done() == 3


def test_lines_of_other_settings_are_refused(tmp_path: Path) -> None:
    own, peer = job(tmp_path), job(tmp_path, "sb3-contrib", "HalfCheetah-v5")
    write(own, [9216], {"max_kl": 0.5})
    with pytest.raises(SystemExit, match=r"max_kl 0\.5 -> 0\.03"):
        own.done()
    write(peer, [100_352], {"use_sde": True})
    with pytest.raises(SystemExit, match="use_sde True -> None"):
        peer.done()


def test_lines_of_before_a_setting_stand_for_its_default(tmp_path: Path) -> None:
    own = job(tmp_path)
    settings = own.settings()
    del settings["anneal_start"]
    own.lines.write_text(json.dumps({"steps": 9216, "settings": settings}) + "\n")
    assert own.done() == 1


def test_lines_of_longer_or_shorter_pieces_are_refused(tmp_path: Path) -> None:
    own = job(tmp_path)
    write(own, [9216, 19456])
    with pytest.raises(SystemExit, match="2 pieces, where 20 pieces of 100000 steps make 10000"):
        replace(own, pieces=20).done()
    with pytest.raises(SystemExit, match="10 pieces of 200000 steps make 40000"):
        replace(own, changes=(("total_steps", 200_000),)).done()


def test_a_piece_takes_the_place_of_what_is_at_its_own_or_after(tmp_path: Path) -> None:
    own = job(tmp_path)
    for piece, steps in enumerate([9216, 19456, 30720]):
        own.record(piece, {"steps": steps})
    own.record(1, {"steps": 20480})
    lines = [json.loads(line) for line in own.lines.read_text().splitlines()]
    assert [line["steps"] for line in lines] == [9216, 20480]
    assert own.done() == 2


def test_a_policy_that_is_further_than_its_piece_is_not_taken_for_it(tmp_path: Path) -> None:
    own = job(tmp_path)
    with pytest.raises(SystemExit, match=r"100352 steps in 1 pieces.* move away the folder"):
        own.record(0, {"steps": 100_352})
    assert not own.lines.exists()


def test_every_task_of_the_peer_is_one_of_ours_and_none_is_in_both_sets() -> None:
    assert not MUJOCO_TASKS.keys() & CLASSIC_TASKS.keys()
    assert SB3.keys() <= SETTINGS.keys()
    assert all(args.env_id == env_id for env_id, args in SETTINGS.items())


def test_changes_are_whole_where_settings_are() -> None:
    changes = changes_of({"max_kl": 1.0, "anneal_steps": 5e5, "per_dimension": 0}, ["natural"])
    assert changes == (("max_kl", 1.0), ("anneal_steps", 500_000), ("per_dimension", 0))
    assert [type(value) for _, value in changes] == [float, int, int]


@pytest.mark.parametrize(
    ("name", "value", "algorithm", "words"),
    [
        ("max_lk", 0.01, "trpo", "max_lk: no number"),
        ("mode", 1.0, "trpo", "mode: no number"),
        ("seed", 12, "trpo", "seed: every run has its own"),
        ("num_envs", math.inf, "trpo", "num_envs inf: it is a finite number"),
        ("num_envs", 0.5, "trpo", "num_envs 0.5: it is a whole number"),
        ("max_kl", 0.01, "sb3-contrib", "leave out sb3-contrib"),
    ],
)
def test_changes_that_no_run_would_heed_are_refused(
    name: str, value: float, algorithm: str, words: str
) -> None:
    with pytest.raises(SystemExit, match=words):
        changes_of({name: value}, ["trpo", algorithm])
