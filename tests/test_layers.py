"""Imports run downwards through the package, the algorithm knows only vectors, files stay short."""

from __future__ import annotations

import ast
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]

LINT = (
    "import sys; from importlinter.cli import lint_imports; sys.exit(lint_imports(no_cache=True))"
)

NOT_IN_THE_ALGORITHM = ("torch.autograd", "torch.distributed", "torch.nn")

LONGEST_FILE = 300
"""In lines."""


def lint(root: Path) -> subprocess.CompletedProcess[str]:
    """Run the contracts of ``[tool.importlinter]`` in ``root/pyproject.toml`` on ``root``."""
    return subprocess.run(
        [sys.executable, "-c", LINT], cwd=root, capture_output=True, text=True, check=False
    )


def names_of_torch(source: str) -> Iterator[str]:
    """Yield the dotted name of every import, and of everything that is read from ``torch``."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield from (f"{node.module}.{alias.name}" for alias in node.names)
        elif isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
            yield f"{node.value.id}.{node.attr}"


def uses_of(source: str, modules: tuple[str, ...]) -> list[str]:
    return [
        name
        for name in names_of_torch(source)
        if any(name == module or name.startswith(f"{module}.") for module in modules)
    ]


def test_imports_keep_the_contracts_of_pyproject() -> None:
    result = lint(ROOT)

    assert result.returncode == 0, result.stdout


@pytest.mark.parametrize(
    ("file", "line", "contract"),
    [
        ("closure/parameters.py", "from trpo_optim.curvature import batch", "downwards"),
        ("distributions/kl.py", "import trpo_optim.theory.bounds", "downwards"),
        ("algorithm/step.py", "from trpo_optim import frozen", "protocol"),
        ("algorithm/line_search.py", "import trpo_optim.algorithm.step", "circular"),
        ("new_room.py", "", "downwards"),
    ],
)
def test_an_import_against_a_contract_is_found(
    tmp_path: Path, file: str, line: str, contract: str
) -> None:
    shutil.copytree(ROOT / "trpo_optim", tmp_path / "trpo_optim")
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    with (tmp_path / "trpo_optim" / file).open("a") as source:
        source.write(f"\n{line}\n")

    result = lint(tmp_path)

    broken = [text for text in result.stdout.splitlines() if text.endswith("BROKEN")]
    assert result.returncode != 0
    if line:
        assert any(contract in text for text in broken), result.stdout
    else:
        assert "new_room" in result.stdout


def test_the_algorithm_uses_neither_autograd_nor_modules_nor_ranks() -> None:
    uses = {
        file.name: found
        for file in (ROOT / "trpo_optim" / "algorithm").glob("*.py")
        if (found := uses_of(file.read_text(), NOT_IN_THE_ALGORITHM))
    }

    assert uses == {}


@pytest.mark.parametrize(
    "source",
    [
        "import torch.nn",
        "from torch import nn",
        "from torch.autograd import grad",
        "import torch\ntorch.autograd.grad(y, x)",
        "def f():\n    import torch.distributed as dist",
    ],
)
def test_a_use_of_autograd_modules_or_ranks_is_found(source: str) -> None:
    assert uses_of(source, NOT_IN_THE_ALGORITHM)


def test_a_use_of_tensors_or_distributions_is_not_reported() -> None:
    source = "import torch\nfrom torch.distributions import Normal\ntorch.nan_to_num(x)"

    assert not uses_of(source, NOT_IN_THE_ALGORITHM)


def test_no_file_is_long() -> None:
    too_long = [
        f"{file.relative_to(ROOT)}: {lines} lines"
        for folder in ("trpo_optim", "tests", "examples", "benchmarks")
        for file in sorted((ROOT / folder).rglob("*.py"))
        if (lines := len(file.read_text().splitlines())) > LONGEST_FILE
    ]

    assert not too_long, "\n".join(too_long)
