"""README and the site: every block runs, every link leads somewhere, every name has a page."""

from __future__ import annotations

import importlib
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import matplotlib as mpl
import pytest
import torch

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"
PAGES = [
    ROOT / "README.md",
    *sorted(page for page in DOCS.rglob("*.md") if not {"_build", "generated"} & {*page.parts}),
]
RUN_BY_OTHERS = {
    "docs/how-to/many-processes.md": "tests/distributed/test_ranks_page.py, under torchrun",
}

REPOSITORY = "https://github.com/trpo-optim/trpo_optim/blob/main/"
NOT_RUN = re.compile(r"<!-- not run: .+? -->\n\n?```python\n.*?^```", re.DOTALL | re.MULTILINE)
BLOCK = re.compile(r"^```(?:python|\{code-cell\}[^\n]*)\n(.*?)^```", re.DOTALL | re.MULTILINE)
LINK = re.compile(r"\]\(([^)#\s]+)(?:#[^)\s]*)?\)")
PACKAGES = ["", ".rollouts", ".snapshots", ".testing", ".theory", ".tokens"]


def name_of(page: Path) -> str:
    """Return a page's path in the repository."""
    return page.relative_to(ROOT).as_posix()


def blocks(page: Path) -> Iterator[tuple[int, str]]:
    """Yield the Python blocks of a page, each with the number of lines above it.

    Blocks that say why they are not run are left out.
    """
    text = NOT_RUN.sub(lambda block: "\n" * block[0].count("\n"), page.read_text("utf-8"))
    for found in BLOCK.finditer(text):
        code = re.sub(r"^:.*$", "", found[1], flags=re.MULTILINE)  # options of a cell
        yield text[: found.start(1)].count("\n"), code


WITH_BLOCKS = [page for page in PAGES if any(blocks(page)) and name_of(page) not in RUN_BY_OTHERS]


@pytest.mark.slow
@pytest.mark.no_cover
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # Box2D's bindings, when imported
@pytest.mark.parametrize("page", WITH_BLOCKS, ids=name_of)
def test_every_block_of_a_page_runs_in_its_order(
    page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    mpl.use("Agg")
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    names: dict[str, Any] = {"__name__": "page"}
    for above, code in blocks(page):
        exec(compile("\n" * above + code, page, "exec"), names)  # lines count as in the page
        report = names.get("report")
        assert report is None or report.accepted


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_every_link_leads_somewhere(page: Path) -> None:
    for target in LINK.findall(page.read_text("utf-8")):
        if target.startswith(REPOSITORY):
            assert (ROOT / target.removeprefix(REPOSITORY)).exists(), target
        elif not re.match(r"[a-z]+:", target):
            assert (page.parent / target).exists(), target


def test_every_public_name_has_a_page() -> None:
    listed = re.findall(r"^   (trpo_optim\.\S+)$", (DOCS / "reference/index.md").read_text(), re.M)
    assert len(listed) == len(set(listed))
    modules = [importlib.import_module(f"trpo_optim{package}") for package in PACKAGES]
    public = {f"{module.__name__}.{name}" for module in modules for name in module.__all__}
    moved = {
        f"trpo_optim.rollouts.{name}"
        for name in importlib.import_module("trpo_optim.snapshots").__all__
    }
    assert public - moved == set(listed)


def test_the_readme_is_short() -> None:
    assert (ROOT / "README.md").stat().st_size <= 8_192
