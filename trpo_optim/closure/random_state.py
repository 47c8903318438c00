"""Random state: torch's, on the CPU and on other devices, and that of single generators."""

from __future__ import annotations

import random
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch

from trpo_optim.torch_private import mps_generator

__all__ = ["generators", "putting_back", "random_state_kept"]


def generators(devices: Iterable[torch.device | str]) -> list[torch.Generator]:
    """Return the default generators that an evaluation may draw from.

    Args:
        devices: Where the evaluation's tensors are. A device without an index is the current one of
            its type.

    Returns:
        The CPU's generator, and that of each further device. A device without random numbers of
        its own, such as ``meta``, has none.
    """
    found = [torch.default_generator]
    for device in dict.fromkeys(map(torch.device, devices)):
        if device.type == "mps":  # it has one device
            found.append(mps_generator())
            continue
        module = getattr(torch, device.type, None)
        if every := getattr(module, "default_generators", ()):
            found.append(every[module.current_device() if device.index is None else device.index])
    return list(dict.fromkeys(found))


def putting_back(generator: Any) -> Callable[[], object] | None:
    """Return what gives a random generator its present state again.

    Args:
        generator: Of torch, of NumPy or of Python's ``random``. None is returned for anything else.
    """
    numpy: Any = sys.modules.get("numpy.random")
    if isinstance(generator, torch.Generator) or (
        numpy and isinstance(generator, numpy.RandomState)
    ):
        return partial(generator.set_state, generator.get_state())
    if numpy and isinstance(generator, numpy.Generator):
        bits = generator.bit_generator
        return partial(setattr, bits, "state", bits.state)
    if isinstance(generator, random.Random) and not isinstance(generator, random.SystemRandom):
        return partial(generator.setstate, generator.getstate())
    return None


@contextmanager
def random_state_kept(
    devices: Iterable[torch.device | str], *, seed: int | None = None
) -> Iterator[Callable[[], bool]]:
    """Put the random state back at the end of a ``with`` block.

    It does what ``torch.random.fork_rng`` does, for devices of any type and of several types at
    once.

    Args:
        devices: Whose random state is kept, besides the CPU's.
        seed: What all of them begin with; None: with the state they have.

    Yields:
        What tells whether random numbers have been drawn since.
    """
    before = [(each, each.get_state()) for each in generators(devices)]
    try:
        if seed is not None:  # torch.manual_seed would take milliseconds, and seed other devices
            for generator, _ in before:
                generator.manual_seed(seed)
        start = before if seed is None else [(each, each.get_state()) for each, _ in before]
        yield lambda: not all(torch.equal(each.get_state(), state) for each, state in start)
    finally:
        for generator, state in before:
            generator.set_state(state)
