"""Runs of the learning benchmark go on where they were killed, and the study halves them."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("sb3_contrib", reason="only make bench installs what benchmarks stand on")
pytest.importorskip("rliable", reason="only make bench installs what benchmarks stand on")

import settings_study
from jobs import Job
from learning import advance, finish, job_of
from settings_study import CANDIDATES


def small(folder: Path, algorithm: str) -> Job:
    job = job_of("CartPole-v1", algorithm, 0, folder)
    args = replace(job.args, total_steps=4096, anneal_steps=4096)
    return replace(job, args=args, pieces=2)


def lines_of(job: Job) -> list[dict[str, Any]]:
    lines = [json.loads(line) for line in job.lines.read_text().splitlines()]
    return [{**line, "cpu": None} for line in lines]


@pytest.mark.learns
@pytest.mark.filterwarnings("default")
@pytest.mark.parametrize("algorithm", ["trpo", "sb3-contrib"])
def test_a_run_goes_on_from_its_last_finished_piece(tmp_path: Path, algorithm: str) -> None:
    whole, killed = small(tmp_path / "whole", algorithm), small(tmp_path / "killed", algorithm)
    finish(whole)
    advance(killed, 0)
    finish(killed)
    assert [line["steps"] for line in lines_of(whole)] == [2048, 4096]
    assert lines_of(killed) == lines_of(whole)


@pytest.mark.learns
@pytest.mark.filterwarnings("default")
def test_a_policy_that_is_further_than_its_piece_is_not_taken_for_it(tmp_path: Path) -> None:
    job = small(tmp_path, "trpo")
    finish(job)
    first, _ = job.lines.read_text().splitlines(keepends=True)
    job.lines.unlink()
    with pytest.raises(SystemExit, match=r"is at step 4096.*ends at step 2048. Move both away"):
        finish(job)
    job.lines.write_text(first)  # of a kill between the checkpoint and the line
    finish(job)
    assert [line["steps"] for line in lines_of(job)] == [2048, 4096]


def test_a_candidate_changes_half_of_a_run(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(CANDIDATES, "wide", {"hidden": 128})
    args = settings_study.job_of("Ant-v5", "wide", 100).args
    assert (args.total_steps, args.anneal_start, args.anneal_steps) == (512_000, 256_000, 512_000)
    assert args.hidden == 128
    args = settings_study.job_of("Pendulum-v1", "today", 100).args
    assert (args.total_steps, args.anneal_start, args.anneal_steps) == (51_200, 0, 51_200)
    with pytest.raises(SystemExit, match=r"There are runs of 'narrow'.* Add it"):
        settings_study.job_of("Ant-v5", "narrow", 100)
