"""The archive of learning runs: finished ones are kept, and need not be made again."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from results import gathered, lines_of, name_of, unpacked, write_archive


def write(folder: Path, seed: int, steps: list[int], algorithm: str = "trpo") -> None:
    folder.mkdir(exist_ok=True)
    lines = [
        json.dumps({"environment": "A-v1", "algorithm": algorithm, "seed": seed, "steps": each})
        for each in steps
    ]
    path = folder / f"{name_of('A-v1', algorithm, seed)}.jsonl"
    path.write_text("\n".join(lines) + "\n")


def test_finished_runs_go_through_the_archive_and_others_stay_out(tmp_path: Path) -> None:
    there, here, archive = tmp_path / "there", tmp_path / "here", tmp_path / "all.jsonl.xz"
    write(there, 0, [10, 20])
    write(there, 1, [10])
    lines = gathered(there, 2, archive)
    write_archive(lines, archive)
    assert lines == lines_of(archive)
    assert [(line["seed"], line["steps"]) for line in lines] == [(0, 10), (0, 20)]
    write(here, 2, [10, 20])
    unpacked(archive, here)
    assert (here / "A-v1__trpo__0.jsonl").read_text() == (there / "A-v1__trpo__0.jsonl").read_text()
    assert len(gathered(here, 2, archive)) == 4


def test_a_run_in_progress_is_not_overwritten(tmp_path: Path) -> None:
    there, archive = tmp_path / "there", tmp_path / "all.jsonl.xz"
    write(there, 0, [10, 20])
    write_archive(gathered(there, 2, archive), archive)
    write(there, 0, [30])
    unpacked(archive, there)
    assert len((there / "A-v1__trpo__0.jsonl").read_text().splitlines()) == 1
    assert [line["steps"] for line in gathered(there, 2, archive)] == [10, 20]


def test_without_an_archive_there_is_nothing(tmp_path: Path) -> None:
    assert lines_of(tmp_path / "none.xz") == []


def test_a_run_of_random_actions_is_one_line(tmp_path: Path) -> None:
    write(tmp_path / "there", 0, [10], "random")
    assert len(gathered(tmp_path / "there", 2, tmp_path / "all.jsonl.xz")) == 1


def test_writing_leaves_no_half_files(tmp_path: Path) -> None:
    write(tmp_path / "there", 0, [10, 20])
    archive = tmp_path / "all.jsonl.xz"
    write_archive(gathered(tmp_path / "there", 2, archive), archive)
    unpacked(archive, tmp_path / "here")
    assert [path.name for path in (tmp_path / "here").iterdir()] == ["A-v1__trpo__0.jsonl"]
    assert {path.name for path in tmp_path.iterdir()} == {"there", "here", archive.name}


def test_another_run_of_the_same_name_is_refused(tmp_path: Path) -> None:
    archive = tmp_path / "all.jsonl.xz"
    write(tmp_path / "there", 0, [10, 20])
    write_archive(gathered(tmp_path / "there", 2, archive), archive)
    write(tmp_path / "there", 0, [10, 21])
    with pytest.raises(SystemExit, match="is not the run"):
        gathered(tmp_path / "there", 2, archive)
    assert [line["steps"] for line in lines_of(archive)] == [10, 20]
