"""Pong's finished runs are those of today's settings."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pong
import pytest
from pong import finished, recorded, settings_of
from results import write_archive


@pytest.fixture(autouse=True)
def archive(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    path = tmp_path / "pong.jsonl.xz"
    monkeypatch.setattr(pong, "ARCHIVE", path)
    return path


def test_runs_of_todays_settings_are_finished(archive: Path) -> None:
    lines = [
        {"scheme": "vine", "seed": 1, "settings": recorded(settings_of("vine", 1))},
        {"scheme": "random", "seed": 0, "sampled": [-21.0]},
    ]
    write_archive(lines, archive)
    assert finished() == lines


@pytest.mark.parametrize(
    ("change", "words"),
    [({"horizon": 7}, "horizon 7 -> "), ({"total_steps": 9}, "total_steps 9 -> ")],
)
def test_runs_of_other_settings_are_refused(
    archive: Path, change: dict[str, Any], words: str
) -> None:
    other = recorded(replace(settings_of("vine", 0), **change))
    write_archive([{"scheme": "vine", "seed": 0, "settings": other}], archive)
    with pytest.raises(SystemExit, match=words):
        finished()


def test_a_setting_that_is_gone_is_named(archive: Path) -> None:
    old = recorded(settings_of("single-path", 0)) | {"gone": 3}
    write_archive([{"scheme": "single-path", "seed": 0, "settings": old}], archive)
    with pytest.raises(SystemExit, match="gone 3 -> None"):
        finished()
