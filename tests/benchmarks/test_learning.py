"""Runs of the learning benchmark are judged piece by piece, and the study halves them."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("sb3_contrib", reason="only make bench installs what benchmarks stand on")
pytest.importorskip("rliable", reason="only make bench installs what benchmarks stand on")

import learning
import learning_report
import settings_study
import train
from archived_runs import finished, lines_of
from learning import DEFAULTS, case, play
from rliable import metrics
from settings_study import CANDIDATES, RETIRED
from tasks import EARLIER, LONG

ROOT = Path(__file__).parents[2]


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


@pytest.mark.parametrize("benchmark", [learning, settings_study])
def test_every_archived_run_is_of_todays_settings(
    monkeypatch: pytest.MonkeyPatch, benchmark: Any
) -> None:
    monkeypatch.chdir(ROOT)
    runs = finished(benchmark.ARCHIVE, benchmark.cases(), DEFAULTS)
    for wanted, run in zip(benchmark.cases(), runs, strict=True):
        assert len(run) in (0, wanted["settings"]["pieces"])
    retired = [line for line in lines_of(benchmark.ARCHIVE) if line["algorithm"] in RETIRED]
    assert sum(map(len, runs)) + len(retired) == len(lines_of(benchmark.ARCHIVE))


def test_a_candidate_changes_half_of_a_run(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(CANDIDATES, "wide", lambda args: replace(args, hidden=128))
    settings = settings_study.case("Ant-v5", "wide", 100)["settings"]
    lengths = [settings[each] for each in ("total_steps", "anneal_start", "anneal_steps")]
    assert lengths == [512_000, 256_000, 512_000]
    assert settings["hidden"] == 128
    settings = settings_study.case("Pendulum-v1", "wide", 100)["settings"]
    lengths = [settings[each] for each in ("total_steps", "anneal_start", "anneal_steps")]
    assert lengths == [51_200, 0, 51_200]


def test_the_pages_tables_say_what_the_archives_say(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(ROOT)
    for module, name in ((learning_report, "learning"), (settings_study, "settings")):
        page = tmp_path / f"{name}.md"
        page.write_text((ROOT / f"docs/results/{name}.md").read_text("utf-8"), "utf-8")
        monkeypatch.setattr(module, "PAGE", page)
    learning.main(report=True)
    settings_study.main(report=True)
    for name in ("learning", "settings"):
        kept = (ROOT / f"docs/results/{name}.md").read_text("utf-8")
        assert (tmp_path / f"{name}.md").read_text("utf-8") == kept
    pictures = {path.name for path in tmp_path.glob("*.png")}
    assert pictures == {"learning.png", "modes.png", "profiles.png"}


def test_what_the_study_adopts_is_in_the_runs_of_trpo_alone() -> None:
    ours, earlier, natural = (
        case("Ant-v5", name, 3)["settings"] for name in ("trpo", EARLIER, "natural")
    )
    changed = {name: value for name, value in ours.items() if value != earlier[name]}
    assert changed == {"advantage_floor": 0.02, "gae_lambda": 0.9, "critic_lambda": 0.95}
    assert {**earlier, "mode": "natural"} == natural
    long = case("Ant-v5", LONG, 3)["settings"]
    lengths = {"total_steps": 3_000_000, "anneal_start": 1_500_000, "anneal_steps": 3_000_000}
    assert long == ours | lengths


def test_the_probability_of_improvement_is_rliables() -> None:
    draw = np.random.default_rng(0)
    ours, theirs = (draw.integers(0, 5, (n, 4)).astype(float) for n in (7, 3))
    found = learning_report.better(ours, theirs)
    assert found == pytest.approx(metrics.probability_of_improvement(ours, theirs), abs=1e-12)
