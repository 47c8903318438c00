"""The runs of the learning benchmark: other settings are refused, finished ones are kept."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from jobs import PEER, RANDOM, Job, gathered
from results import by_run, lines_of
from tasks import HELD_OUT, SEARCH, TASKS


def job_of(env_id: str, algorithm: str, seed: int, folder: Path = Path("nowhere")) -> Job:
    return Job(env_id, algorithm, seed, folder, replace(TASKS[env_id].args, seed=seed), pieces=2)


def play(job: Job, pieces: int = 2) -> None:
    for piece in range(pieces):
        job.record({"steps": 1000 * (piece + 1), "deterministic": [1.5]})


def changed(job: Job, **changes: Any) -> None:
    """Write the job's lines again, with other settings."""
    lines = [json.loads(line) for line in job.lines.read_text().splitlines()]
    lines = [{**line, "settings": line["settings"] | changes} for line in lines]
    job.lines.write_text("".join(json.dumps(line) + "\n" for line in lines))


@pytest.mark.parametrize("algorithm", ["trpo", PEER, RANDOM])
def test_finished_pieces_are_counted(tmp_path: Path, algorithm: str) -> None:
    job = job_of("CartPole-v1", algorithm, 3, tmp_path)
    assert job.done() == 0
    job.record({"steps": 1000})
    assert job.done() == 1
    job.record({"steps": 2000})
    assert job.done() == 2
    lines = [json.loads(line) for line in job.lines.read_text().splitlines()]
    assert [line["steps"] for line in lines] == [1000, 2000]
    assert [line["seed"] for line in lines] == [3, 3]
    assert [path.name for path in tmp_path.iterdir()] == [job.lines.name]  # no half files


@pytest.mark.parametrize(
    ("algorithm", "changes", "words"),
    [
        ("trpo", {"max_kl": 0.5}, r"max_kl 0\.5 -> 0\.03"),
        ("trpo", {"total_steps": 9}, "total_steps 9 -> 100000"),
        ("trpo", {"gone": 3}, "gone 3 -> None"),
        (PEER, {"use_sde": True}, "use_sde True -> None"),
        (RANDOM, {"pieces": 1}, "pieces 1 -> 2"),
    ],
)
def test_lines_of_other_settings_are_refused(
    tmp_path: Path, algorithm: str, changes: dict[str, Any], words: str
) -> None:
    job = job_of("CartPole-v1", algorithm, 0, tmp_path)
    play(job)
    changed(job, **changes)
    with pytest.raises(SystemExit, match=rf"{words}\)\. Go on with the same ones, or"):
        job.done()


def test_lines_of_before_a_setting_stand_for_its_default(tmp_path: Path) -> None:
    job = job_of("CartPole-v1", "trpo", 0, tmp_path)
    settings = job.settings()
    del settings["reuse"]
    job.lines.write_text(json.dumps({"settings": settings}) + "\n")
    assert job.done() == 1


def test_finished_runs_go_into_the_archive_and_others_stay_out(tmp_path: Path) -> None:
    archive = tmp_path / "all.jsonl.xz"
    play(job_of("CartPole-v1", "trpo", 0, tmp_path / "there"))
    play(job_of("CartPole-v1", "trpo", 1, tmp_path / "there"), pieces=1)
    play(job_of("Acrobot-v1", RANDOM, 0, tmp_path / "here"))
    gathered(tmp_path / "there", archive, job_of)
    lines = gathered(tmp_path / "here", archive, job_of)
    assert lines == lines_of(archive)
    runs = by_run(lines)
    assert list(runs) == ["Acrobot-v1__random__0", "CartPole-v1__trpo__0"]
    assert [line["steps"] for line in runs["CartPole-v1__trpo__0"]] == [1000, 2000]


@pytest.mark.parametrize(
    ("changes", "words"),
    [({}, "is not the run that"), ({"max_kl": 0.5}, r"xz was made .*max_kl 0\.5 -> 0\.03")],
)
def test_an_archive_stays_as_it_is_if_a_run_does_not_fit(
    tmp_path: Path, changes: dict[str, Any], words: str
) -> None:
    archive = tmp_path / "all.jsonl.xz"
    job = job_of("CartPole-v1", "trpo", 0, tmp_path / "runs")
    play(job)
    before = gathered(tmp_path / "runs", archive, job_of)
    if changes:  # a new run, or that of the archive otherwise
        job = job_of("CartPole-v1", "trpo", 1, tmp_path / "runs")
        play(job)
        changed(job, **changes)
    else:
        job.lines.write_text(job.lines.read_text().replace("1.5", "2.5"))
    with pytest.raises(SystemExit, match=words):
        gathered(tmp_path / "runs", archive, job_of)
    assert lines_of(archive) == before


def test_without_an_archive_there_is_nothing(tmp_path: Path) -> None:
    assert lines_of(tmp_path / "none.xz") == []


def test_every_task_is_searched_or_held_out() -> None:
    assert sorted(SEARCH + HELD_OUT) == sorted(TASKS)
    assert len(TASKS) == 17
    assert not set(SEARCH) & set(HELD_OUT)
