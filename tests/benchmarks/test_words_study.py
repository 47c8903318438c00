"""The study of language models goes on where it stopped, and its page says what the runs say."""

from __future__ import annotations

import json
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import pytest
import words_study
from words_report import best, by_setting, compared, grouped, write
from words_study import VARIANTS, Study, finished, make

ROOT = Path(__file__).parents[2]


def line(case: dict[str, Any], reward: float) -> dict[str, Any]:
    figures = {
        "reward": [reward] * 8,
        "improving": [1.0] * 8,
        "writing": [0.5] * 8,
        "greedy": [0.5],
    }
    return {**case, "run": figures}


NAMES = {variant: each.name for variant, each in VARIANTS.items()}


def lines(study: Study, ahead: float = 0.02) -> list[dict[str, Any]]:
    """Return runs in which trpo is ahead of PPO's best rate, 3e-4, by about as much."""
    found = []
    for case in study.cases():
        noise = 0.01 * (case["seed"] % 3)
        ours = 0.4 + ahead + 0.1 * noise if case["variant"].startswith("trpo") else 0.3
        reward = (0.4 if case.get("lr") == 3e-4 else ours) + noise
        found.append(line(case, reward))
    return found


def test_only_missing_runs_are_made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    study = Study(tasks=("sorting",), variants=("adamw", "ppo"), seeds=1, folder=tmp_path)
    cases, made = study.cases(), []

    class Workers:
        def __init__(self, _: int) -> None: ...
        def __enter__(self) -> Workers:
            return self

        def __exit__(self, *_: object) -> None: ...
        def shutdown(self, **_: object) -> None: ...
        def submit(self, function: Any, *args: Any) -> Any:
            future: Future[Any] = Future()
            if function is words_study.played:
                made.append(args[0])
                future.set_result(line(args[0], 0.25))
            else:
                future.set_result(None)
            return future

    monkeypatch.setattr(words_study, "pool", Workers)
    whole = [json.dumps(line(case, 0.5)) + "\n" for case in cases[:4]]
    study.lines.write_text("".join(whole) + whole[0][:30], "utf-8")  # killed while it wrote
    make(study)
    assert made == cases[4:]
    assert len(finished(study.lines)) == len(cases)
    make(study)
    assert made == cases[4:]


def test_wider_settings_have_runs_of_the_first_seeds_alone() -> None:
    cases = Study(tasks=("sorting",)).cases()
    seeds = {
        value: {
            each["seed"] for each in cases if (each["variant"], each.get("lr")) == ("ppo", value)
        }
        for value in (3e-4, 3e-3)
    }
    assert seeds == {3e-4: {0, 1, 2, 3, 4}, 3e-3: {0, 1}}


def test_the_best_setting_is_one_with_runs_of_all_seeds() -> None:
    run = {"reward": [0.4]}
    better = {"reward": [0.9]}
    assert best({1.0: {0: run, 1: run}, 2.0: {0: better}, 3.0: {0: run, 1: better}}) == 3.0


def test_the_tables_say_what_the_runs_say() -> None:
    tasks = grouped(lines(Study(tasks=("addition",))), NAMES)
    first, grid = compared(tasks), by_setting(tasks)
    assert "| addition | ppo | 0.0003 | 5 | 0.408 (0.398 to 0.418) |  | 0.500 | 8 | 12 |" in first
    assert (
        "| addition | trpo | 0.01 | 5 | 0.429 (0.417 to 0.440) | +0.021 (+0.020 to +0.022) |"
        in (first)
    )
    assert "0.0001: 0.308, 0.0003: 0.408, 0.001: 0.308, 0.003: 0.305 | 0.300 |" in grid


def test_the_page_is_filled_and_its_picture_drawn(tmp_path: Path) -> None:
    page = tmp_path / "language.md"
    page.write_text((ROOT / "docs/results/language.md").read_text("utf-8"), "utf-8")
    write(lines(Study()), NAMES, page)
    assert "| sorting | ppo | 0.0003 | 5 | 0.408 (" in page.read_text("utf-8")
    assert page.with_suffix(".png").stat().st_size > 20_000
