"""Where the lines of finished learning runs are kept: one compressed file in the repository."""

from __future__ import annotations

import json
import lzma
from collections import defaultdict
from pathlib import Path
from typing import Any

ARCHIVE = Path("docs/results.jsonl.xz")


def name_of(env_id: str, algorithm: str, seed: int) -> str:
    """Return what a run is called."""
    return f"{env_id}__{algorithm}__{seed}"


def lines_of(archive: Path) -> list[dict[str, Any]]:
    """Return all lines of an archive; none where there is no such file."""
    if not archive.exists():
        return []
    with lzma.open(archive, "rt", encoding="utf-8") as file:
        return [json.loads(line) for line in file]


def written(lines: list[dict[str, Any]], archive: Path) -> None:
    """Write an archive of lines; whatever happens, there is a whole one, the old or the new."""
    whole = archive.with_name(f"{archive.name}.new")
    with lzma.open(whole, "wt", encoding="utf-8") as file:
        file.writelines(json.dumps(line) + "\n" for line in lines)
    whole.replace(archive)


def _runs(archive: Path) -> dict[str, list[str]]:
    """Return the lines of an archive by the names of their runs."""
    runs: dict[str, list[str]] = defaultdict(list)
    for line in lines_of(archive):
        name = name_of(line["environment"], line["algorithm"], line["seed"])
        runs[name].append(json.dumps(line))
    return runs


def unpacked(archive: Path, folder: Path) -> None:
    """Write an archive's runs into a folder, those that it does not have yet."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, lines in _runs(archive).items():
        path = folder / f"{name}.jsonl"
        if not path.exists():
            whole = path.with_suffix(".new")
            whole.write_text("\n".join(lines) + "\n", encoding="utf-8")
            whole.replace(path)


def pieces_of(algorithm: str, pieces: int) -> int:
    """Return how many lines a finished run has: one where nothing is learned."""
    return 1 if algorithm == "random" else pieces


def packed(folder: Path, pieces: int, archive: Path) -> list[dict[str, Any]]:
    """Write the finished runs of a folder into an archive, beside those that it has.

    Args:
        folder: Of the runs' files, one a run.
        pieces: How many lines a finished run has that learns.
        archive: The file.

    Returns:
        All its lines, run by run.
    """
    runs = _runs(archive)
    for path in folder.glob("*.jsonl"):
        run = path.read_text("utf-8").splitlines()
        if len(run) >= pieces_of(path.stem.split("__")[1], pieces):
            runs[path.stem] = run
    written([json.loads(line) for _, run in sorted(runs.items()) for line in run], archive)
    return lines_of(archive)
