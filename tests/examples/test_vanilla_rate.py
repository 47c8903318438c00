"""Vanilla policy gradient has no default learning rate, in the example as in the optimizer."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from train import Args, train

from trpo_optim import TrustRegionError


def test_without_a_rate_vanilla_is_refused_before_anything_is_written(tmp_path: Path) -> None:
    args = Args(mode="vanilla", run_dir=tmp_path / "run", total_steps=128, batch_size=128)
    with pytest.raises(TrustRegionError, match="lr was not given"):
        train(args)
    assert not args.folder().exists()
    run = train(replace(args, lr=0.01))
    assert run.optimizer.param_groups[0]["lr"] == 0.01
    with pytest.raises(TrustRegionError, match="lr was not given"):
        train(args)
    assert (args.folder() / "checkpoint.pt").exists()  # the earlier run is where it was
