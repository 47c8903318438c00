"""Finished runs are kept and not made again; those of other settings are refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from archived_runs import append, finished, lines_of, make

CASES: list[dict[str, Any]] = [
    {"environment": env_id, "seed": seed, "settings": {"max_kl": 0.01, "reuse": 0}}
    for seed in (0, 1)
    for env_id in ("CartPole-v1", "Acrobot-v1")
]


def play(case: dict[str, Any]) -> list[dict[str, Any]]:
    """Return two evaluations."""
    if case["seed"] == 7:
        raise ValueError("the simulator is unstable")
    return [{"steps": steps, "deterministic": [1.5 + case["seed"]]} for steps in (1000, 2000)]


@pytest.fixture
def archive(tmp_path: Path) -> Path:
    return tmp_path / "all.jsonl.xz"


@pytest.mark.slow
def test_only_missing_runs_are_made(archive: Path) -> None:
    kept = [{**CASES[2], "steps": 1000, "deterministic": [-3.0]}]
    append(archive, kept)
    make(archive, CASES, play)
    first, second, third, fourth = finished(archive, CASES)
    assert third == kept
    assert first == [{**CASES[0], **result} for result in play(CASES[0])]
    assert [second[0]["environment"], fourth[1]["seed"]] == ["Acrobot-v1", 1]
    before = archive.read_bytes()
    make(archive, CASES, play)
    assert archive.read_bytes() == before
    assert [path.name for path in archive.parent.iterdir()] == [archive.name]  # no half files


@pytest.mark.slow
def test_what_is_finished_before_a_failure_is_kept(archive: Path) -> None:
    cases = [CASES[0], {**CASES[1], "seed": 7}, *CASES[2:]]
    with pytest.raises(ValueError, match="unstable"):
        make(archive, cases, play, workers=1)
    first, failed, *_ = finished(archive, cases)
    assert len(first) == 2
    assert failed == []


@pytest.mark.parametrize(
    ("changes", "words"),
    [({"max_kl": 0.5}, r"max_kl 0\.5 -> 0\.01"), ({"gone": 3}, "gone 3 -> None")],
)
def test_runs_of_other_settings_are_refused(
    archive: Path, changes: dict[str, Any], words: str
) -> None:
    append(archive, [{**CASES[0], "settings": CASES[0]["settings"] | changes}])
    before = archive.read_bytes()
    refusal = rf"xz was made .*{words}\)\. Go on with the same ones"
    with pytest.raises(SystemExit, match=refusal):
        finished(archive, CASES)
    with pytest.raises(SystemExit, match=refusal):
        make(archive, CASES, play)
    assert archive.read_bytes() == before


def test_runs_of_before_a_setting_had_its_default(archive: Path) -> None:
    line = {**CASES[0], "settings": {"max_kl": 0.01}}
    append(archive, [line])
    assert finished(archive, CASES[:1], {"reuse": 0, "hidden": 64}) == [[line]]
    with pytest.raises(SystemExit, match="reuse 2 -> 0"):
        finished(archive, CASES[:1], {"reuse": 2})


def test_runs_that_nobody_asks_for_stay_in_the_archive(archive: Path) -> None:
    append(archive, [CASES[0]])
    append(archive, [CASES[1]])
    assert finished(archive, CASES[1:2]) == [[CASES[1]]]
    assert lines_of(archive) == CASES[:2]


def test_without_an_archive_there_is_nothing(archive: Path) -> None:
    assert lines_of(archive) == []
    assert finished(archive, CASES) == [[], [], [], []]
