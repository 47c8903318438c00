"""A benchmark replaces the tables of a page, and nothing else of it."""

from __future__ import annotations

from pathlib import Path

import pytest
from page import fill, marks, renew

ROOT = Path(__file__).parents[2]
PAGE = """# Speed

Kept by hand.

<!-- table: first -->

| old |

<!-- end -->

More words, and *first* again.

<!-- table: second -->
<!-- end -->
"""


@pytest.fixture
def page(tmp_path: Path) -> Path:
    path = tmp_path / "page.md"
    path.write_text(PAGE, "utf-8")
    return path


def test_what_lies_between_the_marks_is_replaced_each_time(page: Path) -> None:
    fill(page, first="| newer |", second=r"| \1 |")
    fill(page, first="| new |")
    wanted = PAGE.replace("old", "new").replace("second -->\n", "second -->\n\n| \\1 |\n\n")
    assert page.read_text("utf-8") == wanted


def table() -> str:
    return "| measured |"


def test_each_table_is_measured_into_its_place(page: Path) -> None:
    assert marks(page) == ["first", "second"]
    renew(page, dict.fromkeys(marks(page), table))
    assert page.read_text("utf-8").count("\n\n| measured |\n\n<!-- end -->") == 2


@pytest.mark.parametrize(
    ("broken", "count"),
    [
        (PAGE.replace("<!-- table: first -->", ""), 0),
        (PAGE + PAGE, 2),
        (PAGE.replace("| old |\n\n<!-- end -->", "| old |"), 0),  # that of the next is not its own
    ],
)
def test_a_page_without_the_one_place_is_refused_and_kept(
    page: Path, broken: str, count: int
) -> None:
    page.write_text(broken, "utf-8")
    with pytest.raises(ValueError, match=f"has {count} tables called 'first'.*<!-- end -->"):
        fill(page, first="| new |", second="| new |")
    assert page.read_text("utf-8") == broken


def test_nothing_is_measured_for_a_page_without_a_place(page: Path) -> None:
    with pytest.raises(ValueError, match="has 0 tables called 'third'"):
        renew(page, {"third": table})


@pytest.mark.parametrize("path", sorted((ROOT / "docs").rglob("*.md")), ids=lambda path: path.name)
def test_every_table_of_the_site_can_be_filled(path: Path, tmp_path: Path) -> None:
    copy = tmp_path / path.name
    copy.write_text(path.read_text("utf-8"), "utf-8")
    fill(copy, **dict.fromkeys(marks(copy), "| new |"))
    assert copy.read_text("utf-8").count("<!-- end -->") == len(marks(copy))
