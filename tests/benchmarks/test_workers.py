"""Processes of the benchmarks end with the one that started them."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

MAIN = """
import os, sys, time
from pathlib import Path
from workers import pool

def work(path):
    Path(path).write_text(str(os.getpid()))
    time.sleep(300)

if __name__ == "__main__":
    with pool(1) as workers:
        workers.submit(work, sys.argv[1]).result()
"""


def alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    status = Path(f"/proc/{pid}/stat")  # whoever adopted it may not have collected it yet
    return not (status.exists() and status.read_text().rpartition(") ")[2].startswith("Z"))


@pytest.mark.slow
def test_a_worker_ends_when_its_parent_is_killed(tmp_path: Path) -> None:
    main, mark = tmp_path / "main.py", tmp_path / "pid"
    main.write_text(MAIN)
    paths = os.pathsep.join(sys.path)
    parent = subprocess.Popen(
        [sys.executable, str(main), str(mark)], env={**os.environ, "PYTHONPATH": paths}
    )
    deadline = time.monotonic() + 120
    while not (mark.exists() and mark.read_text()) and time.monotonic() < deadline:
        time.sleep(0.05)
    pid = int(mark.read_text())
    assert alive(pid)
    parent.send_signal(signal.SIGKILL)
    parent.wait()
    while alive(pid) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not alive(pid)
