"""Without the extra gym: the error says what to install."""

from __future__ import annotations

import subprocess
import sys

import pytest

SCRIPT = """
import sys
sys.modules["gymnasium"] = None  # as if it were not installed
import trpo_optim
try:
    import {module}
except ImportError as error:
    assert isinstance(error.__cause__, ModuleNotFoundError), repr(error.__cause__)
    print(error)
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    "module", ["trpo_optim.rollouts", "trpo_optim.snapshots", "trpo_optim.rollouts.returns"]
)
def test_the_import_error_names_the_extra(module: str) -> None:
    script = SCRIPT.format(module=module)
    result = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True
    )
    assert "need Gymnasium, which is not installed" in result.stdout
    assert "pip install 'trpo-optim[gym]'" in result.stdout
