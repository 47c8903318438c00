"""Real processes with a real process group between them, and what each of them returns."""

from __future__ import annotations

import datetime
import importlib
import multiprocessing
import os
import pickle
import signal
import sys
import tempfile
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed import FileStore  # type: ignore[attr-defined]  # it does not say so

ROOT = Path(__file__).parent.parent

CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(  # once, and not by every rank of every test
    [
        "pytest",
        "gymnasium.vector",
        "torch._dynamo.testing",
        "torch.distributed.checkpoint.state_dict",
        "torch.distributed.fsdp",
        "torch.distributed.tensor.parallel",
        "torch.nn.parallel",
        "trpo_optim.rollouts",
        "problems",
    ]
)


@dataclass(frozen=True)
class Raised:
    """What a rank raised: the name of its type, its text, and the traceback for the reader."""

    kind: str
    text: str
    trace: str


def on_ranks(
    size: int,
    function: Callable[..., Any],
    *args: Any,
    backend: str = "gloo",
    timeout: float = 60.0,
    patience: float = 120.0,
    lost: Sequence[int] = (),
) -> list[Any]:
    """Call ``function(rank, *args)`` in processes that form a group.

    Args:
        size: How many.
        function: What each calls, a function of a module.
        args: Further arguments, pickled.
        backend: What the group sends by.
        timeout: The group's, in seconds.
        patience: How long all may take together, in seconds.
        lost: The ranks that are expected to die or to hang.

    Returns:
        What each returned, ``Raised`` where it raised, None for the lost.
    """
    results: list[Any] = [None] * size
    with tempfile.TemporaryDirectory() as folder:
        processes, pipes = [], {}
        for rank in range(size):
            ours, theirs = CONTEXT.Pipe(duplex=False)
            process = CONTEXT.Process(
                target=_run,
                args=(
                    rank,
                    size,
                    Path(folder),
                    backend,
                    timeout,
                    theirs,
                    measured(),
                    function,
                    args,
                ),
            )
            process.start()
            theirs.close()
            processes.append(process)
            pipes[ours] = rank
        try:
            expected = {ours: rank for ours, rank in pipes.items() if rank not in lost}
            end = datetime.datetime.now() + datetime.timedelta(seconds=patience)
            while expected:
                left = (end - datetime.datetime.now()).total_seconds()
                ready = wait(list(expected), timeout=max(0.0, left))
                assert ready, f"ranks {sorted(expected.values())} hang"
                for each in ready:
                    assert isinstance(each, Connection)
                    results[expected.pop(each)] = pickle.loads(each.recv_bytes())
        finally:
            for process in processes:
                if process.pid is not None and process.is_alive():
                    process.join(0.0 if process.exitcode is None and lost else 5.0)
                    process.kill()
                process.join()
    return results


def measured() -> bool:
    """Return whether this process measures which lines are run, so that the ranks do, too."""
    return sys.gettrace() is not None


def values_of(results: Sequence[Any]) -> list[Any]:
    """Return results none of which is an error."""
    traces = [each.trace for each in results if isinstance(each, Raised)]
    assert not traces, "\n".join(traces)
    return list(results)


def _run(
    rank: int,
    size: int,
    folder: Path,
    backend: str,
    timeout: float,
    pipe: Any,
    measure: bool,
    function: Callable[..., Any],
    args: tuple[Any, ...],
) -> None:
    torch.set_num_threads(1)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    watch = None
    if measure:
        coverage = importlib.import_module("coverage")
        watch = coverage.Coverage(config_file=ROOT / "pyproject.toml", data_suffix=True)
        watch.start()
    try:
        dist.init_process_group(
            backend,
            store=FileStore(str(folder / "store"), size),
            rank=rank,
            world_size=size,
            timeout=datetime.timedelta(seconds=timeout),
        )
        result = function(rank, *args)
    except BaseException as error:
        result = Raised(type(error).__name__, str(error), traceback.format_exc())
    if watch is not None:
        watch.stop()
        watch.save()
    pipe.send_bytes(
        pickle.dumps(result)
    )  # send() would share a tensor's memory, which dies with us
    pipe.close()
