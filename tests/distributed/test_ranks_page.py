"""The page on many processes: its script learns under torchrun, saves, and loads again."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

NO_THREADS = """
from pathlib import Path
assert not [task for task in Path("/proc/self/task").glob("*/comm") if "gloo" in task.read_text()]
"""

UPDATES = 6
"""Of the page's 20: enough to see it learn."""

PAGE = Path(__file__).parents[2] / "docs" / "how-to" / "many-processes.md"


@pytest.mark.ranks
@pytest.mark.learns
def test_the_page_s_script_learns_and_saves(tmp_path: Path) -> None:
    blocks = re.findall(r"```python\n(.*?)```", PAGE.read_text("utf-8"), re.DOTALL)
    page = "\n".join([*blocks, NO_THREADS])
    assert page.count("range(20)") == 1
    script = tmp_path / "loop.py"
    script.write_text(page.replace("range(20)", f"range({UPDATES})"), "utf-8")
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    output = subprocess.run(
        [*command, "--nproc-per-node", "2", str(script)],
        check=True,
        capture_output=True,
        text=True,
        timeout=240,
        cwd=tmp_path,
        env={**os.environ, "GLOO_SOCKET_IFNAME": "lo", "OMP_NUM_THREADS": "1"},
    ).stdout
    returns = [float(value) for value in re.findall(r"return ([0-9.]+)", output)]
    assert len(returns) == UPDATES
    assert returns[-1] > 4 * returns[0]
    assert (tmp_path / "checkpoint" / ".metadata").exists()
