"""The archive of learning runs: finished ones are kept, and need not be made again."""

from __future__ import annotations

import json
from pathlib import Path

from results import lines_of, name_of, packed, unpacked


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
    lines = packed(there, 2, archive)
    assert lines == lines_of(archive)
    assert [(line["seed"], line["steps"]) for line in lines] == [(0, 10), (0, 20)]
    write(here, 2, [10, 20])
    unpacked(archive, here)
    assert (here / "A-v1__trpo__0.jsonl").read_text() == (there / "A-v1__trpo__0.jsonl").read_text()
    assert len(packed(here, 2, archive)) == 4


def test_a_run_in_progress_is_not_overwritten(tmp_path: Path) -> None:
    there, archive = tmp_path / "there", tmp_path / "all.jsonl.xz"
    write(there, 0, [10, 20])
    packed(there, 2, archive)
    write(there, 0, [30])
    unpacked(archive, there)
    assert len((there / "A-v1__trpo__0.jsonl").read_text().splitlines()) == 1
    assert [line["steps"] for line in packed(there, 2, archive)] == [10, 20]


def test_without_an_archive_there_is_nothing(tmp_path: Path) -> None:
    assert lines_of(tmp_path / "none.xz") == []


def test_a_run_of_random_actions_is_one_line(tmp_path: Path) -> None:
    write(tmp_path / "there", 0, [10], "random")
    assert len(packed(tmp_path / "there", 2, tmp_path / "all.jsonl.xz")) == 1


def test_writing_leaves_no_half_files(tmp_path: Path) -> None:
    write(tmp_path / "there", 0, [10, 20])
    packed(tmp_path / "there", 2, tmp_path / "all.jsonl.xz")
    unpacked(tmp_path / "all.jsonl.xz", tmp_path / "here")
    assert [path.name for path in (tmp_path / "here").iterdir()] == ["A-v1__trpo__0.jsonl"]
    assert not list(tmp_path.glob("*.new"))
