"""The examples that are one file each run in every mode, draw a picture, and learn."""

from __future__ import annotations

import ast
from pathlib import Path
from types import ModuleType
from typing import Any

import cartpole
import continuous
import matplotlib.image
import pytest

MODULES = [cartpole, continuous]
MAY_IMPORT = {"gymnasium", "matplotlib", "numpy", "torch", "tqdm", "trpo_optim", "tyro"}
OF_PYTHON = {"functools", "math", "typing"}


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["trpo", "natural", "vanilla"])
@pytest.mark.parametrize("module", MODULES, ids=lambda module: module.__name__)
def test_every_mode_runs_and_draws(tmp_path: Path, module: ModuleType, mode: Any) -> None:
    picture = tmp_path / "picture.png"

    recent = module.train(mode=mode, total_steps=500, picture=str(picture))

    assert recent > 0
    height, width, _ = matplotlib.image.imread(picture).shape
    assert (width, height) == (720, 840)


@pytest.mark.learns
def test_cartpole_is_solved(tmp_path: Path) -> None:
    assert cartpole.train(total_steps=50_000, picture=str(tmp_path / "picture.png")) >= 450


@pytest.mark.learns
def test_hopper_learns_to_hop(tmp_path: Path) -> None:
    """Its first episodes return 10 to 20."""
    assert continuous.train(total_steps=30_720, picture=str(tmp_path / "picture.png")) >= 130


@pytest.mark.parametrize("module", MODULES, ids=lambda module: module.__name__)
def test_one_file_is_short_and_stands_alone(module: ModuleType) -> None:
    text = Path(str(module.__file__)).read_text("utf-8")
    imported = {
        name.partition(".")[0]
        for node in ast.walk(ast.parse(text))
        if isinstance(node, ast.Import | ast.ImportFrom)
        for name in (
            [node.module or "."]
            if isinstance(node, ast.ImportFrom)
            else [alias.name for alias in node.names]
        )
    }

    assert imported <= MAY_IMPORT | OF_PYTHON
    assert len(text.splitlines()) <= 120
