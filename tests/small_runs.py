"""Training runs of a few seconds, and what they saved."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import train

pytestmark = [
    pytest.mark.learns,
    pytest.mark.filterwarnings("ignore::DeprecationWarning:tensorboard"),
]


def small(folder: Path, **changes: Any) -> train.Args:
    """Return settings for a run of a few seconds."""
    args = train.Args(run_dir=folder, batch_size=128, num_envs=4, total_steps=1024, critic_epochs=2)
    return replace(args, checkpoint_every=1, **changes)


def checkpoint(folder: Path) -> dict[str, Any]:
    content: dict[str, Any] = torch.load(folder / "checkpoint.pt", weights_only=True)
    return content
