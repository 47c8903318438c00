"""An environment that holds torch and what torch needs, and a probe of the package in it."""

from __future__ import annotations

import importlib.metadata
import os
import re
import subprocess
from pathlib import Path

from packaging.requirements import Requirement

ROOT = Path(__file__).parents[1]

PROBE = """
import importlib
import json
import sys

import torch
from torch.distributions import Categorical

import trpo_optim
from trpo_optim import TrustRegionOptimizer, frozen, mean_kl

policy = torch.nn.Linear(4, 2)
observations, actions = torch.randn(32, 4), torch.randint(2, (32,))
advantages = torch.randn(32)
old = frozen(Categorical(logits=policy(observations)))


def closure():
    new = Categorical(logits=policy(observations))
    ratio = (new.log_prob(actions) - old.log_prob(actions)).exp()
    return -(ratio * advantages).mean(), mean_kl(old, new), new


def error_of_importing(module):
    try:
        importlib.import_module(module)
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return None


report = TrustRegionOptimizer(policy.parameters()).step(closure)
print(
    json.dumps(
        {
            "accepted": report.accepted,
            "errors": {module: error_of_importing(module) for module in sys.argv[1:]},
            "file": trpo_optim.__file__,
            "version": trpo_optim.__version__,
        }
    )
)
"""
"""Takes a step, then imports the modules that it is given."""


def run(*command: str) -> str:
    """Run ``command`` where neither this checkout nor the user's settings are found."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}
    result = subprocess.run(
        command,
        cwd=ROOT.anchor,
        env=kept | {"PIP_CONFIG_FILE": os.devnull, "PYTHONNOUSERSITE": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout


def closure_of(name: str) -> set[str]:
    """Return the distributions that ``name`` requires, and theirs, as far as they are installed."""
    found: set[str] = set()
    todo = [name]
    while todo:
        distribution = re.sub(r"[-_.]+", "-", todo.pop()).lower()
        if distribution in found:
            continue
        try:
            requirements = importlib.metadata.requires(distribution) or []
        except (
            importlib.metadata.PackageNotFoundError
        ):  # of a platform that torch was not built for
            continue
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
