"""Runs made side by side. Finished ones are lines of an archive, and are not made again.

An archive is one compressed file of JSON lines in the repository. A *case* says what run to make:
what tells it from other runs, and under ``"settings"`` what it is made with. Every line of its run
holds the case and one result.
"""

from __future__ import annotations

import json
import lzma
import os
import tempfile
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, wait
from itertools import islice
from pathlib import Path
from typing import Any
from unittest import mock

from checkpoint import require_same, whole
from filelock import FileLock
from tqdm import tqdm
from workers import pool

Line = dict[str, Any]


def lines_of(archive: Path) -> list[Line]:
    """Return all lines of an archive; none where there is no such file."""
    if not archive.exists():
        return []
    with lzma.open(archive, "rt", encoding="utf-8") as file:
        return [json.loads(line) for line in file]


def add(archive: Path, lines: Sequence[Line]) -> None:
    """Add lines to an archive. Whatever happens, there is a whole one, the old or the new.

    Commands that run at the same time wait for each other.
    """
    with FileLock(Path(tempfile.gettempdir()) / f"{archive.name}.lock"):
        text = "".join(json.dumps(line) + "\n" for line in [*lines_of(archive), *lines])
        with whole(archive) as file:
            file.write(lzma.compress(text.encode()))


def finished(
    archive: Path, cases: Sequence[Line], defaults: Mapping[str, Any] | None = None
) -> list[list[Line]]:
    """Return the runs of an archive, case by case: their lines, or none.

    The defaults are what settings were before they could be chosen. A run that was made with other
    settings than its case's ends the program.
    """
    lines, runs = lines_of(archive), []
    for case in cases:
        settings, identity = case["settings"], {k: v for k, v in case.items() if k != "settings"}
        run = [line for line in lines if identity.items() <= line.items()]
        before = dict(defaults or {})
        if not before.keys() <= settings.keys():  # those of another library, with other names
            before = {}
        for line in run[:1]:
            require_same(archive, before | line["settings"], settings)
        runs.append(run)
    return runs


def missing(
    archive: Path, cases: Sequence[Line], defaults: Mapping[str, Any] | None = None
) -> list[Line]:
    """Return the cases that an archive has no run of. The arguments are those of ``finished``."""
    runs = finished(archive, cases, defaults)
    return [case for case, run in zip(cases, runs, strict=True) if not run]


def make(
    archive: Path,
    cases: Sequence[Line],
    play: Callable[[Line], Sequence[Line]],
    defaults: Mapping[str, Any] | None = None,
    workers: int = 2,
) -> None:
    """Make the runs that an archive lacks, in order, and add each as soon as it is finished.

    After a failure, runs that have begun are finished and added, and no other begins. As many as
    there are workers run side by side, each in a process of one thread.
    """
    left, failure = missing(archive, cases, defaults), None
    runs: dict[Future[Sequence[Line]], Line] = {}
    quiet = mock.patch.dict(os.environ, TQDM_DISABLE="1")  # one bar for all runs, not one each
    with quiet, pool(workers) as processes, tqdm(total=len(left), unit="run") as bar:
        begin = iter(left)
        while True:
            for case in islice(begin, 0 if failure else workers - len(runs)):
                runs[processes.submit(play, case)] = case
            if not runs:
                break
            for run in wait(runs, return_when=FIRST_COMPLETED).done:
                case = runs.pop(run)
                if error := run.exception():
                    failure = error
                else:
                    add(archive, [{**case, **result} for result in run.result()])
                bar.update()
    if failure:
        raise failure
