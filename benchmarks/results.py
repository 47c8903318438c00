"""Where the lines of finished learning runs are kept: one compressed file in the repository."""

from __future__ import annotations

import json
import lzma
from collections import defaultdict
from pathlib import Path
from typing import Any

ARCHIVE = Path("docs/results.jsonl.xz")


def lines_of(archive: Path) -> list[dict[str, Any]]:
    """Return all lines of an archive; none where there is no such file."""
    if not archive.exists():
        return []
    with lzma.open(archive, "rt", encoding="utf-8") as file:
        return [json.loads(line) for line in file]


def unpacked(archive: Path, folder: Path) -> None:
    """Write an archive's runs into a folder, those that it does not have yet."""
    folder.mkdir(parents=True, exist_ok=True)
    runs: dict[str, list[str]] = defaultdict(list)
    for line in lines_of(archive):
        name = f"{line['environment']}__{line['algorithm']}__{line['seed']}"
        runs[name].append(json.dumps(line))
    for name, lines in runs.items():
        path = folder / f"{name}.jsonl"
        if not path.exists():
            path.write_text("\n".join(lines) + "\n", encoding="utf-8")


def pieces_of(algorithm: str, pieces: int) -> int:
    """Return how many lines a finished run has: one where nothing is learned."""
    return 1 if algorithm == "random" else pieces


def packed(folder: Path, pieces: int, archive: Path) -> list[dict[str, Any]]:
    """Write the finished runs of a folder into an archive, and return their lines.

    Args:
        folder: Of the runs' files, one a run.
        pieces: How many lines a finished run has that learns.
        archive: The file.

    Returns:
        The lines, run by run.
    """
    lines = []
    for path in sorted(folder.glob("*.jsonl")):
        run = path.read_text("utf-8").splitlines()
        if len(run) >= pieces_of(path.stem.split("__")[1], pieces):
            lines += run
    with lzma.open(archive, "wt", encoding="utf-8") as file:
        file.writelines(f"{line}\n" for line in lines)
    return [json.loads(line) for line in lines]
