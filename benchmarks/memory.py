"""How much memory a piece of torch code needs at its peak."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch.profiler import ProfilerActivity, profile


def peak_bytes(job: Callable[[], object], device: str = "cpu") -> int:
    """Return by how much a job raises torch's memory at its peak.

    Args:
        job: Run once.
        device: Where its tensors live: cpu, cuda, ...

    Returns:
        Bytes above what was allocated before.
    """
    if device != "cpu":
        module = torch.get_device_module(device)
        before: int = module.memory_allocated()
        module.reset_peak_memory_stats()
        job()
        highest: int = module.max_memory_allocated()
        return highest - before
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as record:
        job()
    assert record.profiler is not None
    assert record.profiler.kineto_results is not None
    now = peak = 0
    for event in record.profiler.kineto_results.events():
        if event.name() == "[memory]":
            now += event.nbytes()
            peak = max(peak, now)
    return peak
