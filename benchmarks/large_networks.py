"""The memory and the time of one step of a large network.

    PYTHONPATH=examples/advanced python benchmarks/large_networks.py

Prints a table. The unit of memory is one vector of the parameters' length.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

import torch
from memory import peak_bytes
from scene import Scene
from table import steps_of, table

from trpo_optim import StepReport

WIDTHS = (990, 3_150, 9_990)
"""Hidden units of the networks: one million, ten million and a hundred million parameters."""

SAMPLES = 16


def large_networks(widths: Sequence[int] = WIDTHS, threads: int = 2) -> str:
    """Return the table of what one step takes, by parameters.

    Each network has a process of its own. The step that is timed is an optimizer's first one, which
    also compares a product with finite differences.

    Args:
        widths: Hidden units of the networks.
        threads: CPU threads of torch.

    Returns:
        The table in Markdown.
    """
    head = ["parameters", "peak (vectors)", "peak of the process (vectors)", "peak (GiB)"]
    rows = [[*head, "seconds", "products", "outcome"]]
    for width in widths:
        with ProcessPoolExecutor(1, get_context("spawn")) as workers:
            rows.append(workers.submit(_row, width, threads).result())
    return table(*rows)


def _row(width: int, threads: int) -> list[str]:
    """Take two first steps: one that is timed, one whose every allocation is recorded."""
    torch.set_num_threads(threads)
    Scene(64, SAMPLES).update(third=True).run()  # loads the code
    scene = Scene(width, SAMPLES)
    before, job = _status("VmRSS"), scene.update(third=True)
    start = time.perf_counter()
    report = job.run()
    seconds = time.perf_counter() - start
    resident = _status("VmHWM") - before
    job.prepare()
    allocated = peak_bytes(scene.update(third=True).run)
    parameters = sum(each.numel() for each in scene.parameters)
    vector = 4 * parameters
    assert isinstance(report, StepReport)
    return [
        steps_of(parameters),
        f"{allocated / vector:.1f}",
        f"{resident / vector:.1f}",
        f"{allocated / 2**30:.2f}",
        f"{seconds:.1f}",
        str(report.fisher_products),
        report.outcome.value,
    ]


def _status(name: str) -> int:
    """Return an entry of this process's memory, in bytes, as Linux counts it."""
    lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    entries = dict(line.split(":", 1) for line in lines)
    return 1024 * int(entries[name].split()[0])


if __name__ == "__main__":
    print(large_networks())
