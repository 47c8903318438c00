"""Finished runs are kept and not made again; those of other settings are refused."""

from __future__ import annotations

import time
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import pytest
from archived_runs import add, finished, lines_of, make

CASES: list[dict[str, Any]] = [
    {"environment": env_id, "seed": seed, "settings": {"max_kl": 0.01, "reuse": 0}}
    for seed in (0, 1)
    for env_id in ("CartPole-v1", "Acrobot-v1")
]


def play(case: dict[str, Any]) -> list[dict[str, Any]]:
    """Return two evaluations; seed 7 fails, and seed 8 leaves a mark and takes longer."""
    if case["seed"] == 7:
        raise ValueError("the simulator is unstable")
    if "mark" in case["settings"]:
        Path(case["settings"]["mark"]).touch()
        time.sleep(1)
    return [{"steps": steps, "deterministic": [1.5 + case["seed"]]} for steps in (1000, 2000)]


@pytest.fixture
def archive(tmp_path: Path) -> Path:
    return tmp_path / "all.jsonl.xz"


@pytest.mark.slow
def test_only_missing_runs_are_made(archive: Path) -> None:
    kept = [{**CASES[2], "steps": 1000, "deterministic": [-3.0]}]
    add(archive, kept)
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
def test_after_a_failure_what_has_begun_is_kept_and_no_more_begins(
    archive: Path, tmp_path: Path
) -> None:
    marks = [tmp_path / str(index) for index in range(3)]
    failing = {"environment": "Ant-v5", "seed": 7, "settings": {}}
    slow = [
        {"environment": "Ant-v5", "seed": 8 + index, "settings": {"mark": str(mark)}}
        for index, mark in enumerate(marks)
    ]
    with pytest.raises(ValueError, match="unstable"):
        make(archive, [failing, *slow], play)
    assert [mark.exists() for mark in marks] == [True, False, False]
    assert [len(run) for run in finished(archive, [failing, *slow])] == [0, 2, 0, 0]


def adds(archive: Path, seed: int) -> None:
    for number in range(20):
        add(archive, [{"seed": seed, "number": number}])


@pytest.mark.slow
def test_commands_at_the_same_time_lose_nothing(archive: Path) -> None:
    context = get_context("spawn")
    commands = [context.Process(target=adds, args=(archive, seed)) for seed in range(2)]
    for each in commands:
        each.start()
    for each in commands:
        each.join()
    found = {(line["seed"], line["number"]) for line in lines_of(archive)}
    assert found == {(seed, number) for seed in range(2) for number in range(20)}


@pytest.mark.parametrize(
    ("changes", "words"),
    [({"max_kl": 0.5}, r"max_kl 0\.5 -> 0\.01"), ({"gone": 3}, "gone 3 -> None")],
)
def test_runs_of_other_settings_are_refused(
    archive: Path, changes: dict[str, Any], words: str
) -> None:
    add(archive, [{**CASES[0], "settings": CASES[0]["settings"] | changes}])
    before = archive.read_bytes()
    refusal = rf"xz was made .*{words}\)\. Go on with the same ones"
    with pytest.raises(SystemExit, match=refusal):
        finished(archive, CASES)
    with pytest.raises(SystemExit, match=refusal):
        make(archive, CASES, play)
    assert archive.read_bytes() == before


def test_runs_of_before_a_setting_had_its_default(archive: Path) -> None:
    line = {**CASES[0], "settings": {"max_kl": 0.01}}
    add(archive, [line])
    assert finished(archive, CASES[:1], {"reuse": 0}) == [[line]]
    with pytest.raises(SystemExit, match="reuse 2 -> 0"):
        finished(archive, CASES[:1], {"reuse": 2})
    other = {"reuse": 0, "hidden": 64}  # of runs that have both settings
    with pytest.raises(SystemExit, match="reuse None -> 0"):
        finished(archive, CASES[:1], other)


def test_runs_that_nobody_asks_for_stay_in_the_archive(archive: Path) -> None:
    add(archive, [CASES[0]])
    add(archive, [CASES[1]])
    assert finished(archive, CASES[1:2]) == [[CASES[1]]]
    assert lines_of(archive) == CASES[:2]


def test_without_an_archive_there_is_nothing(archive: Path) -> None:
    assert lines_of(archive) == []
    assert finished(archive, CASES) == [[], [], [], []]
