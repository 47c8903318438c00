"""Archives of finished runs: one compressed file of JSON lines in the repository."""

from __future__ import annotations

import json
import lzma
from collections import defaultdict
from pathlib import Path
from typing import Any

from checkpoint import whole

Line = dict[str, Any]


def lines_of(archive: Path) -> list[Line]:
    """Return all lines of an archive; none where there is no such file."""
    if not archive.exists():
        return []
    with lzma.open(archive, "rt", encoding="utf-8") as file:
        return [json.loads(line) for line in file]


def write_archive(lines: list[Line], archive: Path) -> None:
    """Write an archive of lines; whatever happens, there is a whole one, the old or the new."""
    text = "".join(json.dumps(line) + "\n" for line in lines)
    with whole(archive) as file:
        file.write(lzma.compress(text.encode()))


def name_of(line: Line) -> str:
    """Return what the run of a line is called."""
    return f"{line['environment']}__{line['algorithm']}__{line['seed']}"


def by_run(lines: list[Line]) -> dict[str, list[Line]]:
    """Return lines by the names of their runs."""
    runs: dict[str, list[Line]] = defaultdict(list)
    for line in lines:
        runs[name_of(line)].append(line)
    return runs
