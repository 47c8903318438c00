"""Runs made side by side. Finished ones are lines of an archive, and are not made again.

An archive is one compressed file of JSON lines in the repository. A *case* says what run to make:
what tells it from other runs, and under ``"settings"`` what it is made with. Every line of its run
holds the case and one result.
"""

from __future__ import annotations

import json
import lzma
import os
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import as_completed
from pathlib import Path
from typing import Any

from checkpoint import require_same, whole
from tqdm import tqdm
from workers import pool

Line = dict[str, Any]


def lines_of(archive: Path) -> list[Line]:
    """Return all lines of an archive; none where there is no such file."""
    if not archive.exists():
        return []
    with lzma.open(archive, "rt", encoding="utf-8") as file:
        return [json.loads(line) for line in file]


def append(archive: Path, lines: Sequence[Line]) -> None:
    """Add lines to an archive; whatever happens, there is a whole one, the old or the new."""
    text = "".join(json.dumps(line) + "\n" for line in [*lines_of(archive), *lines])
    with whole(archive) as file:
        file.write(lzma.compress(text.encode()))


def finished(
    archive: Path, cases: Sequence[Line], defaults: Mapping[str, Any] | None = None
) -> list[list[Line]]:
    """Return the runs of an archive, case by case: their lines, or none.

    Args:
        archive: The file.
        cases: The runs that are looked for.
        defaults: What settings were before they could be chosen.

    Raises:
        SystemExit: If a run was made with other settings than its case's.
    """
    lines, runs = lines_of(archive), []
    for case in cases:
        settings, who = case["settings"], {k: v for k, v in case.items() if k != "settings"}
        run = [line for line in lines if who.items() <= line.items()]
        before = {k: v for k, v in (defaults or {}).items() if k in settings}
        for line in run[:1]:
            require_same(archive, before | line["settings"], settings)
        runs.append(run)
    return runs


def make(
    archive: Path,
    cases: Sequence[Line],
    play: Callable[[Line], Sequence[Line]],
    defaults: Mapping[str, Any] | None = None,
    workers: int = 2,
) -> None:
    """Make the runs that an archive lacks, and add each as soon as it is finished.

    Args:
        archive: The file.
        cases: The runs, in the order in which they begin.
        play: Makes the run of a case and returns its results.
        defaults: What settings were before they could be chosen.
        workers: Runs side by side, each in a process of one thread.

    Raises:
        SystemExit: If a run of the archive was made with other settings than its case's.
    """
    os.environ["TQDM_DISABLE"] = "1"  # one bar for all runs, not one each
    there = finished(archive, cases, defaults)
    missing = [case for case, run in zip(cases, there, strict=True) if not run]
    with pool(workers) as processes:
        runs = {processes.submit(play, case): case for case in missing}
        try:
            for run in tqdm(as_completed(runs), total=len(runs), unit="run", disable=False):
                append(archive, [{**runs[run], **result} for result in run.result()])
        finally:
            processes.shutdown(cancel_futures=True)  # after a failure, start no further run
