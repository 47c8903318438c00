"""The study of language models goes on where it stopped, and reports the best setting."""

from __future__ import annotations

import json
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import pytest
import words_study
from words_study import Study, finished, make, report


def line(case: dict[str, Any], reward: float) -> dict[str, Any]:
    run = {"reward": [reward, reward], "improving": [1.0, 2.0], "greedy": [0.5]}
    return {**case, "run": run}


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


def test_the_report_shows_the_best_setting_and_the_worst() -> None:
    study = Study(tasks=("addition",), variants=("trpo",), seeds=2)
    runs = [line(case, 0.1 if case["max_kl"] != 0.01 else 0.4) for case in study.cases()]
    text = report(runs)
    assert "| trpo | 0.01 | 2 | 0.400 | 0.400 to 0.400 | 0.500 | 3.0 |" in text
    assert "| trpo | 0.160 | 0.100 |" in text
