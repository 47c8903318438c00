"""The derivation in numbers, the picture of Algorithm 1, and the page that maps the paper."""

from __future__ import annotations

import importlib
import re
from pathlib import Path

import monotonic
import pytest
import theory_walk

import trpo_optim
from trpo_optim.theory import random_mdp

TESTS = Path(__file__).parents[1]
PAGE = TESTS.parent / "docs" / "concepts" / "theory.md"


@pytest.mark.parametrize("seed", [1, 2, 3])
def test_every_statement_of_the_paper_is_walked_through(
    seed: int, capsys: pytest.CaptureFixture[str]
) -> None:
    theory_walk.main(seed)
    lines = re.findall(r"^ *\((\d+)\)  .* [=≤≥] .*$", capsys.readouterr().out, re.MULTILINE)
    assert {int(number) for number in lines} == set(range(1, 19))


@pytest.mark.parametrize(
    ("left", "relation", "right"), [(1.0, "=", 1.001), (1.0, "≤", 0.999), (0.999, "≥", 1.0)]
)
def test_a_statement_that_does_not_hold_stops_the_walk(
    left: float, relation: str, right: float
) -> None:
    with pytest.raises(ArithmeticError, match=f"words: {left} {relation} {right} does not hold"):
        theory_walk.claim("", "words", left, relation, right)
    theory_walk.claim("", "but for rounding", 1.0, relation, 1.0 + 1e-15)


@pytest.mark.slow
def test_algorithm_1_keeps_its_promise_and_trpo_is_faster(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    runs, optimum = monotonic.compare(random_mdp(5, 3, 0.8, seed=1), 60)
    by_name = {run.name: run for run in runs}
    safe = [by_name["Algorithm 1: penalty C"], by_name["conservative iteration (5)"]]
    for run in safe:
        assert min(run.promised) > 0
        assert min(run.gains) > 0
    for run in runs:
        bounds = zip(run.gains, run.promised, strict=True)
        assert all(gain >= promised - 1e-10 for gain, promised in bounds)
        assert max(run.returns) <= optimum + 1e-10
    trpo = by_name["TRPO: mean KL ≤ δ (12)"]
    assert trpo.steps_to(0.99, optimum) is not None
    assert all(run.steps_to(0.99, optimum) is None for run in safe)
    monotonic.main(iterations=3, picture=tmp_path / "new" / "picture.png")
    said = capsys.readouterr().out
    assert all(run.name in said for run in runs)
    assert (tmp_path / "new" / "picture.png").stat().st_size > 10_000


def test_the_page_names_functions_and_tests_that_exist() -> None:
    rows = [line.split(" | ") for line in PAGE.read_text("utf-8").splitlines() if "| `" in line]
    assert len(rows) > 20
    files = {path.stem: path.read_text("utf-8") for path in TESTS.rglob("test_*.py")}
    for *_, functions, test in rows:
        for name in re.findall(r"`([\w.]+)`", functions):
            found: object = trpo_optim
            for part in name.split("."):
                found = _member(found, part)
        for module, name in re.findall(r"`(\w+)\.(\w+)`", test):
            assert f"def {name}(" in files[module]


def _member(holder: object, name: str) -> object:
    """Return a module's or a class's member, imported if need be."""
    if not hasattr(holder, name):
        importlib.import_module(f"{getattr(holder, '__name__', '')}.{name}")
    return getattr(holder, name)
