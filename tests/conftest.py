"""One thread for every test, since on problems this small more of them only wait for each other."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest
import torch
import torch._dynamo
from torch.distributions import Distribution

torch.set_num_threads(1)


def pytest_xdist_auto_num_workers() -> int:
    """One more than there are cores, since tests of several processes wait for one another."""
    return (os.cpu_count() or 1) + 1


@pytest.fixture
def compiler() -> Iterator[None]:
    """Compile afresh, and undo what compiling does to every distribution of the process."""
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()
    Distribution.set_default_validate_args(True)
