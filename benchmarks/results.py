"""Where the lines of finished learning runs are kept: one compressed file in the repository."""

from __future__ import annotations

import json
import lzma
from collections import defaultdict
from pathlib import Path
from typing import Any

from checkpoint import whole

ARCHIVE = Path("docs/results/results.jsonl.xz")


def name_of(env_id: str, algorithm: str, seed: int) -> str:
    """Return what a run is called."""
    return f"{env_id}__{algorithm}__{seed}"


def lines_of(archive: Path) -> list[dict[str, Any]]:
    """Return all lines of an archive; none where there is no such file."""
    if not archive.exists():
        return []
    with lzma.open(archive, "rt", encoding="utf-8") as file:
        return [json.loads(line) for line in file]


def write_archive(lines: list[dict[str, Any]], archive: Path) -> None:
    """Write an archive of lines; whatever happens, there is a whole one, the old or the new."""
    text = "".join(json.dumps(line) + "\n" for line in lines)
    with whole(archive) as file:
        file.write(lzma.compress(text.encode()))


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
            write_run(lines, path)


def write_run(lines: list[str], path: Path) -> None:
    """Write a run's file; whatever happens, there is a whole one, the old or the new."""
    with whole(path) as file:
        file.write("".join(f"{line}\n" for line in lines).encode())


def pieces_of(algorithm: str, pieces: int) -> int:
    """Return how many lines a finished run has: one where nothing is learned."""
    return 1 if algorithm == "random" else pieces


def gathered(folder: Path, pieces: int, archive: Path) -> list[dict[str, Any]]:
    """Return the finished runs of a folder and an archive's.

    Args:
        folder: Of the runs' files, one a run.
        pieces: How many lines a finished run has that learns.
        archive: The file.

    Returns:
        All lines, run by run.

    Raises:
        SystemExit: If both have a run, and not the same.
    """
    runs = _runs(archive)
    for path in folder.glob("*.jsonl"):
        run = path.read_text("utf-8").splitlines()
        if len(run) < pieces_of(path.stem.split("__")[1], pieces):
            continue
        if runs.setdefault(path.stem, run) != run:
            raise SystemExit(
                f"{path} is not the run that {archive} has of this name. Move the one away that is "
                "not wanted."
            )
    return [json.loads(line) for _, run in sorted(runs.items()) for line in run]
