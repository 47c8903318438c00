"""Pong's finished runs are those of today's settings, and its page says what they came to."""

from __future__ import annotations

from pathlib import Path

import pong
import pytest
import vine
from archived_runs import finished
from checkpoint import comparable


@pytest.fixture(autouse=True)
def repository(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(Path(__file__).parents[2])


def test_the_archive_has_the_runs_of_todays_settings() -> None:
    cases = [pong.case(scheme, seed) for scheme in pong.COLORS for seed in range(pong.SEEDS)]
    runs = finished(pong.ARCHIVE, cases, comparable(vine.Args()))
    assert [len(run) for run in runs] == [1] * 6
    lines = [line for run in runs for line in run]
    assert pong.table(lines) in pong.PAGE.read_text("utf-8")


def test_runs_of_other_settings_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(pong.SETTINGS, "vine", pong.COMMON)
    with pytest.raises(SystemExit, match="horizon 5 -> 10"):
        finished(pong.ARCHIVE, [pong.case("vine", 0)], comparable(vine.Args()))
