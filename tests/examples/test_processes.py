"""What the processes of a training run share: numbers of all of them, and whose run it is."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from checkpoint import prepare
from normaliser import Normaliser
from processes import Processes
from ranks import on_ranks, values_of
from torch import Tensor

SHARES = [slice(0, 50), slice(50, 60)]


def values() -> Tensor:
    """Return values of two processes that are of different kinds."""
    torch.manual_seed(0)
    return torch.cat([torch.randn(50, 3, dtype=torch.float64) * 3, 7 + torch.randn(10, 3).double()])


def shared(rank: int) -> tuple[Tensor, Tensor, list[int], int]:
    """Return the statistics of all, ranks, and a seed."""
    processes, own = Processes("cpu"), values()[SHARES[rank]]
    normalise = Normaliser(3, "cpu")
    normalise.update(own, processes)
    return normalise.mean, normalise.scale, processes.all(rank), processes.seed(5)


@pytest.mark.ranks
def test_statistics_are_those_of_all_processes() -> None:
    whole = values()
    mean, std = whole.mean(0), whole.std(0, correction=0)
    results = values_of(on_ranks(2, shared))
    for means, scales, ranks, _ in results:
        torch.testing.assert_close(means, mean.float(), rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(scales, std.float(), rtol=1e-4, atol=1e-4)
        assert ranks == [0, 1]
    assert results[0][-1] != results[1][-1]
    assert results[0][-1] == Processes("cpu").seed(5)


def test_alone_everything_is_ones_own() -> None:
    processes = Processes("cpu")
    assert (processes.group, processes.size, processes.rank, processes.launch) == (None, 1, 0, "")
    assert processes.first
    assert not processes.restarted
    assert processes.all("mine") == ["mine"]


@pytest.mark.parametrize(
    ("resume", "restarted", "launch", "goes_on"),
    [
        (False, False, "second", False),
        (False, True, "second", False),  # the one that was lost had not begun
        (False, True, "first", True),
        (True, False, "second", True),
    ],
)
def test_a_run_goes_on_for_who_began_it_and_for_who_says_so(
    tmp_path: Path, resume: bool, restarted: bool, launch: str, goes_on: bool
) -> None:
    folder, processes = tmp_path / "run", Processes("cpu")
    processes.launch = "first"
    assert not prepare(folder, processes, resume=False)
    (folder / "checkpoint.pt").touch()
    processes.launch, processes.restarted = launch, restarted
    assert prepare(folder, processes, resume=resume) == goes_on
    assert (folder / "checkpoint.pt").exists() == goes_on
    assert (tmp_path / "run.1" / "checkpoint.pt").exists() != goes_on


def test_a_run_without_a_checkpoint_keeps_its_events_to_itself(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    prepare(folder, Processes("cpu"), resume=False)
    (folder / "events.out.tfevents.0").touch()
    prepare(folder, Processes("cpu"), resume=False)
    assert not any(folder.iterdir())
    (folder / "notes.txt").touch()  # which no run has written
    prepare(folder, Processes("cpu"), resume=False)
    assert (folder / "notes.txt").exists()
