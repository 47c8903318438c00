"""What holds for every test: one thread, the profiles of properties, what coverage leaves out."""

from __future__ import annotations

from collections.abc import Iterator

import profiles
import pytest
import torch
import torch._dynamo
from torch.distributions import Distribution

torch.set_num_threads(1)  # on problems this small more of them only wait for each other
profiles.register()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Measure no coverage in tests that are long, or of other code: it costs half as much again."""
    for item in items:
        long = item.get_closest_marker("learns") or item.get_closest_marker("slow")
        if long or {"examples", "benchmarks"} & {*item.path.parts}:
            item.add_marker("no_cover")


@pytest.fixture
def compiler() -> Iterator[None]:
    """Compile afresh, and undo what compiling does to every distribution of the process."""
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()
    Distribution.set_default_validate_args(True)
