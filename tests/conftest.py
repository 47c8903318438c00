"""One thread for every test, since on problems this small more of them only wait for each other."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
import torch._dynamo
from torch.distributions import Distribution

torch.set_num_threads(1)


@pytest.fixture
def compiler() -> Iterator[None]:
    """Compile afresh, and undo what compiling does to every distribution of the process."""
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()
    Distribution.set_default_validate_args(True)
