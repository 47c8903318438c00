"""Without the extra gym: the error says what to install."""

from __future__ import annotations

import subprocess
import sys

import pytest

MODULES = ["trpo_optim.rollouts", "trpo_optim.snapshots", "trpo_optim.rollouts.returns"]

SCRIPT = f"""
import importlib
import sys
sys.modules["gymnasium"] = None  # as if it were not installed
import trpo_optim
for module in {MODULES}:
    try:
        importlib.import_module(module)
    except ImportError as error:
        assert isinstance(error.__cause__, ModuleNotFoundError), repr(error.__cause__)
        print(error)
"""


@pytest.mark.slow
def test_the_import_error_names_the_extra() -> None:
    result = subprocess.run(
        [sys.executable, "-c", SCRIPT], capture_output=True, text=True, check=True
    )
    errors = result.stdout.splitlines()
    assert len(errors) == len(MODULES)
    for error in errors:
        assert "need Gymnasium, which is not installed" in error
        assert "pip install 'trpo-optim[gym]'" in error
