"""Pages of results: kept by hand, except for their tables, which a benchmark writes between marks.

<!-- table: memory -->

| update | peak (MiB) |
...

<!-- end -->
"""

from __future__ import annotations

import os
import platform
import re
from collections.abc import Callable, Mapping, Sequence
from importlib.metadata import version
from pathlib import Path

import torch
from table import records
from workers import pool

BEGIN = "<!-- table: {} -->\n"
END = "<!-- end -->"


def marks(path: Path) -> list[str]:
    """Return the names of a page's tables."""
    return re.findall(BEGIN.format(r"(\w+)"), path.read_text("utf-8"))


def fill(path: Path, **parts: str) -> None:
    """Replace what lies between marks of a page by Markdown, by the names of the marks.

    Raises:
        ValueError: If the page has not one pair of marks of each name. It then stays as it is.
    """
    text = path.read_text("utf-8")
    for name, part in parts.items():
        begin = BEGIN.format(name)
        found = re.findall(f"{begin}(?:(?!<!--).)*{END}", text, re.DOTALL)
        if len(found) != 1:
            raise ValueError(
                f"{path} has {len(found)} tables called {name!r}, and needs exactly one. Put it "
                f"between the lines {begin.strip()} and {END}."
            )
        text = text.replace(found[0], f"{begin}\n{part}\n\n{END}")
    path.write_text(text, "utf-8")


def renew(path: Path, tables: Mapping[str, Callable[[], str]], threads: int = 1) -> None:
    """Measure tables, each in a process of its own, and write each into the page at once."""
    fill(path, **{name: "" for name in tables if name not in marks(path)})  # fails before hours
    for name, measure in tables.items():
        with pool(1, threads) as process:
            part = process.submit(measure).result()
        print(f"{part}\n", flush=True)
        fill(path, **{name: part})


def setting(packages: Sequence[str] = (), device: str = "cpu") -> str:
    """Return the table of what figures were measured on, with versions of torch and packages."""
    where = f"{platform.machine()}, CPU cores: {os.cpu_count()}"
    if device != "cpu":
        where = torch.get_device_module(device).get_device_name()
    return records([{"machine": where} | {name: version(name) for name in ("torch", *packages)}])
