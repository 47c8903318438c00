"""Training runs that are made in pieces, and go on from the last finished piece."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import train
from checkpoint import comparable, require_same, whole
from results import Line, by_run, lines_of, name_of, write_archive
from tasks import TASKS

PEER, RANDOM = "sb3-contrib", "random"
"""The algorithms that are not this package's: sb3-contrib's TRPO, and random actions."""


@dataclass(frozen=True)
class Job:
    """One training run.

    Attributes:
        env_id: The task.
        algorithm: What its lines call it.
        seed: Of networks, actions and environments.
        folder: Where its lines and its checkpoints go.
        args: The settings of examples/advanced/train.py, of which sb3-contrib's TRPO and random
            actions only heed the length.
        pieces: How many pieces it is made in, with an evaluation after each.
    """

    env_id: str
    algorithm: str
    seed: int
    folder: Path
    args: train.Args
    pieces: int = 10

    @property
    def name(self) -> str:
        """What its files are called."""
        return name_of(self.header)

    @property
    def header(self) -> Line:
        """The entries of its lines that tell it from other runs."""
        return {"environment": self.env_id, "algorithm": self.algorithm, "seed": self.seed}

    @property
    def lines(self) -> Path:
        """Where its evaluations are written."""
        return self.folder / f"{self.name}.jsonl"

    def settings(self) -> dict[str, Any]:
        """Return what it is run with, as its lines say it."""
        other = {PEER: TASKS[self.env_id].zoo, RANDOM: {}}
        own = other.get(self.algorithm, comparable(self.args))
        return {**(own or {}), "total_steps": self.args.total_steps, "pieces": self.pieces}

    def done(self) -> int:
        """Return how many pieces are finished; lines of other settings are refused."""
        lines = self.lines.read_text("utf-8").splitlines() if self.lines.exists() else []
        if lines:
            self.require_own(json.loads(lines[-1]), self.lines)
        return len(lines)

    def require_own(self, line: Line, path: Path) -> None:
        """Refuse lines that were run with other settings.

        Args:
            line: One of them. A setting that did not exist then had today's default.
            path: The file that has it.
        """
        before = {} if self.algorithm in (PEER, RANDOM) else comparable(train.Args())
        require_same(path, before | line["settings"], self.settings())

    def record(self, result: dict[str, Any]) -> None:
        """Add the line of a finished piece; whatever happens, there is a whole file."""
        before = self.lines.read_bytes() if self.lines.exists() else b""
        line = json.dumps({**self.header, **result, "settings": self.settings()})
        with whole(self.lines) as file:
            file.write(before + line.encode() + b"\n")


def gathered(folder: Path, archive: Path, job_of: Callable[[str, str, int], Job]) -> list[Line]:
    """Add the finished runs of a folder to an archive.

    Args:
        folder: Where their files are.
        archive: The file.
        job_of: From task, algorithm and seed to the run as it is today.

    Returns:
        All lines of the archive, run by run.

    Raises:
        SystemExit: If a run was made with other settings than today's, or if both have a run, and
            not the same. The archive then stays as it is.
    """
    runs = by_run(lines_of(archive))
    for path in folder.glob("*.jsonl"):
        run = [json.loads(line) for line in path.read_text("utf-8").splitlines()]
        if len(run) == run[-1]["settings"]["pieces"] and runs.setdefault(path.stem, run) != run:
            raise SystemExit(
                f"{path} is not the run that {archive} has of this name. Move the one away that is "
                "not wanted."
            )
    for line, *_ in runs.values():
        job_of(line["environment"], line["algorithm"], line["seed"]).require_own(line, archive)
    lines = [line for _, run in sorted(runs.items()) for line in run]
    write_archive(lines, archive)
    return lines
