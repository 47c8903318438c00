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
from typing import Any

import torch
from memory import peak_bytes
from scene import Scene
from table import steps_of, table

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
    torch.set_num_threads(threads)
    Scene(64, SAMPLES).update(third=True).run()  # loads the code
    scene = Scene(width, SAMPLES)
    job = scene.update(third=True)
    found: dict[str, Any] = {}

    def step() -> None:
        before, start = _status("VmRSS"), time.perf_counter()
        found["report"] = job.run()
        found["seconds"] = time.perf_counter() - start
        found["resident"] = _status("VmHWM") - before

    allocated = peak_bytes(step)
    parameters = sum(each.numel() for each in scene.parameters)
    vector = 4 * parameters
    return [
        steps_of(parameters),
        f"{allocated / vector:.1f}",
        f"{found['resident'] / vector:.1f}",
        f"{allocated / 2**30:.2f}",
        f"{found['seconds']:.1f}",
        str(found["report"].fisher_products),
        found["report"].outcome.value,
    ]


def _status(name: str) -> int:
    """Return an entry of this process's memory, in bytes, as Linux counts it."""
    lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    entries = dict(line.split(":", 1) for line in lines)
    return 1024 * int(entries[name].split()[0])


if __name__ == "__main__":
    print(large_networks())
