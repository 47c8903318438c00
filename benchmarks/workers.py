"""Processes that make runs side by side, and end with the one that started them."""

from __future__ import annotations

import os
import threading
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context, parent_process

import torch


def pool(workers: int, threads: int = 1) -> ProcessPoolExecutor:
    """Return a pool of processes, each with so many CPU threads of torch.

    Should this process be killed, they end at once: left alone they would go on with runs that the
    next start makes again, and both would write the same files.
    """
    return ProcessPoolExecutor(workers, get_context("spawn"), _begin, (threads,))


def _begin(threads: int) -> None:
    torch.set_num_threads(threads)
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    if parent := parent_process():
        parent.join()
        os._exit(1)
