"""A virtual environment with a distribution and what it requires, and nothing else, in a moment."""

from __future__ import annotations

import importlib.metadata
import os
import re
import subprocess
import venv
from pathlib import Path

from packaging.requirements import Requirement

__all__ = ["environment_of", "requirements_of", "run"]


def environment_of(name: str, folder: Path) -> Path:
    """Make an environment in ``folder`` that holds ``name``, and return its interpreter.

    Nothing is downloaded: the files are links to those of the running interpreter.
    """
    venv.create(folder, with_pip=False)
    (site_packages,) = folder.glob("lib/python*/site-packages")
    for path in files_of(requirements_of(name)):
        (site_packages / path.name).symlink_to(path)
    return folder / "bin" / "python"


def requirements_of(name: str) -> set[str]:
    """Return ``name`` and the installed distributions that it requires, directly or not."""
    found: set[str] = set()
    todo = [name]
    while todo:
        distribution = re.sub(r"[-_.]+", "-", todo.pop()).lower()
        if distribution in found:
            continue
        try:
            requirements = importlib.metadata.requires(distribution) or []
        except importlib.metadata.PackageNotFoundError:
            continue  # of an optional build of torch, such as one for GPUs
        found.add(distribution)
        todo += (
            requirement.name
            for requirement in map(Requirement, requirements)
            if requirement.marker is None or requirement.marker.evaluate({"extra": ""})
        )
    return found


def files_of(distributions: set[str]) -> set[Path]:
    """Return what ``distributions`` have put into site-packages, at its top level."""
    return {
        Path(str(distribution.locate_file(file.parts[0])))
        for distribution in map(importlib.metadata.distribution, distributions)
        for file in distribution.files or []
        if file.parts[0] not in {"..", "__pycache__"} and file.suffix != ".pth"
    }


def run(*command: str) -> str:
    """Return what ``command`` prints where it finds neither checkout nor the user's settings."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}
    result = subprocess.run(
        command,
        cwd=Path.cwd().anchor,
        env=kept | {"PIP_CONFIG_FILE": os.devnull, "PYTHONNOUSERSITE": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout
