"""Runs of the learning benchmark are judged piece by piece, and the study halves them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("sb3_contrib", reason="only make bench installs what benchmarks stand on")
pytest.importorskip("rliable", reason="only make bench installs what benchmarks stand on")

import learning
import settings_study
import train
from archived_runs import finished
from learning import DEFAULTS, case, cases, play
from settings_study import CANDIDATES
from tasks import RUNS


def small(algorithm: str, pieces: int = 2) -> dict[str, Any]:
    whole = case("CartPole-v1", algorithm, 0)
    length = {"total_steps": 4096, "pieces": pieces}
    if algorithm != "sb3-contrib":
        length["anneal_steps"] = 4096
    return {**whole, "settings": whole["settings"] | length}


@pytest.mark.learns
@pytest.mark.filterwarnings("default")
@pytest.mark.parametrize("algorithm", ["trpo", "sb3-contrib"])
def test_a_run_is_judged_after_each_piece(algorithm: str) -> None:
    lines = play(small(algorithm))
    assert [line["steps"] for line in lines] == [2048, 4096]
    assert all(len(line["deterministic"]) == len(line["sampled"]) == 20 for line in lines)
    assert sum(lines[1]["sampled"]) != sum(lines[0]["sampled"])


@pytest.mark.learns
def test_a_run_is_that_of_the_example_however_often_it_is_judged(tmp_path: Path) -> None:
    settings = small("trpo")["settings"]
    del settings["pieces"]
    run = train.train(train.Args(**settings, run_dir=tmp_path))
    often, once = play(small("trpo", 2)), play(small("trpo", 1))
    assert often[-1]["training"] == once[-1]["training"] == run.recent_return()
    assert often[-1]["deterministic"] == once[-1]["deterministic"]


def test_every_finished_run_is_of_todays_settings(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(Path(__file__).parents[2])
    made = [run for run in finished(learning.ARCHIVE, cases(), DEFAULTS) if run]
    assert all(len(run) == run[0]["settings"]["pieces"] for run in made)
    assert made
    assert any(finished(settings_study.ARCHIVE, settings_study.cases(), DEFAULTS))
    assert len(cases()) == sum(seeds * len(env_ids) for seeds, env_ids in RUNS.values())


def test_a_candidate_changes_half_of_a_run(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(CANDIDATES, "wide", {"hidden": 128})
    settings = settings_study.case("Ant-v5", "wide", 100)["settings"]
    lengths = [settings[each] for each in ("total_steps", "anneal_start", "anneal_steps")]
    assert lengths == [512_000, 256_000, 512_000]
    assert settings["hidden"] == 128
    settings = settings_study.case("Pendulum-v1", "earlier settings", 100)["settings"]
    lengths = [settings[each] for each in ("total_steps", "anneal_start", "anneal_steps")]
    assert lengths == [51_200, 0, 51_200]
