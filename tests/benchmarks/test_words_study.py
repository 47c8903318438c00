"""The study of language models makes the runs it should, and its tables say what they came to."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("pandas", reason="only make bench installs what benchmarks stand on")

from words_report import by_setting, chosen, compared, frame, write
from words_study import cases

ROOT = Path(__file__).parents[2]


def line(case: dict[str, Any], reward: float) -> dict[str, Any]:
    figures = {
        "reward": [reward] * 8,
        "improving": [1.0] * 8,
        "writing": [0.5] * 8,
        "greedy": [0.5],
    }
    return {**case, **figures}


def lines(ahead: float = 0.02) -> list[dict[str, Any]]:
    """Return runs in which trpo is ahead of PPO's best rate, 3e-4, by about as much."""
    found = []
    for case in cases():
        noise = 0.01 * (case["seed"] % 3)
        ours = 0.4 + ahead + 0.1 * noise if case["variant"].startswith("trpo") else 0.3
        found.append(line(case, (0.4 if case["setting"] == 3e-4 else ours) + noise))
    return found


def test_wider_settings_have_runs_of_the_first_seeds_alone() -> None:
    seeds = {
        value: {
            each["seed"] for each in cases() if (each["variant"], each["setting"]) == ("ppo", value)
        }
        for value in (3e-4, 3e-3)
    }
    assert seeds == {3e-4: {0, 1, 2, 3, 4}, 3e-3: {0, 1}}


def test_the_best_setting_is_one_with_runs_of_all_seeds() -> None:
    made = [(1.0, 0, 0.4), (1.0, 1, 0.4), (2.0, 0, 0.9), (3.0, 0, 0.4), (3.0, 1, 0.9)]
    runs = [{"setting": setting, "seed": seed, "reward": [x]} for setting, seed, x in made]
    assert chosen(frame(runs)) == 3.0


def test_the_tables_say_what_the_runs_say() -> None:
    runs = frame(lines())
    first, grid = compared(runs), by_setting(runs)
    assert "| addition | ppo | 0.0003 | 5 | 0.408 (0.398 to 0.418) |  | 0.500 | 8 | 12 |" in first
    trpo = "| addition | trpo | 0.01 | 5 | 0.429 (0.417 to 0.440) | +0.021 (+0.020 to +0.022) |"
    assert trpo in first
    assert "0.0001: 0.308, 0.0003: 0.408, 0.001: 0.308, 0.003: 0.305 | 0.300 |" in grid


def test_the_page_is_filled_and_its_picture_drawn(tmp_path: Path) -> None:
    page = tmp_path / "language.md"
    page.write_text((ROOT / "docs/results/language.md").read_text("utf-8"), "utf-8")
    write(lines(), page)
    assert "| sorting | ppo | 0.0003 | 5 | 0.408 (" in page.read_text("utf-8")
    assert page.with_suffix(".png").stat().st_size > 20_000
