"""What holds for every test: one thread, the profiles of properties, what coverage leaves out."""

from __future__ import annotations

import gc
import os
import random
import sys
from collections.abc import Generator, Iterator

import profiles
import pytest

profiles.register()


def pytest_configure() -> None:
    """Draw the seed of what is drawn at random, once for all workers, unless it is given."""
    os.environ.setdefault("RANDOM_SEED", str(random.SystemRandom().randrange(2**32)))


def pytest_report_header() -> str:
    """Say the seed at the start, so that it is known also where a worker dies."""
    return f"seed of random faults: RANDOM_SEED={os.environ['RANDOM_SEED']}"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Measure no coverage where a test is long or of other code: it takes half as long again."""
    for item in items:
        long = any(map(item.get_closest_marker, ("learns", "slow", "package")))
        if long or {"examples", "benchmarks"} & {*item.path.parts}:
            item.add_marker("no_cover")


@pytest.hookimpl(wrapper=True, trylast=True)
def pytest_runtest_call(item: pytest.Item) -> Generator[None, object, object]:
    """Measure no coverage of tests marked ``no_cover``.

    In a worker of pytest-xdist, pytest-cov measures twice, and its own pause stops one of the two.
    """
    tracer = sys.gettrace()
    if item.get_closest_marker("no_cover"):
        sys.settrace(None)
    try:
        return (yield)
    finally:
        sys.settrace(tracer)


@pytest.fixture(scope="session", autouse=True)
def one_thread() -> None:
    """On problems this small more of them only wait for each other."""
    import torch

    torch.set_num_threads(1)


@pytest.fixture(scope="session", autouse=True)
def fewer_collections() -> None:
    """Keep the garbage collector from going through all of torch again and again."""
    gc.set_threshold(50_000, 20, 100)


@pytest.fixture
def undrawn(monkeypatch: pytest.MonkeyPatch) -> None:
    """Leave out the picture of the example's runs, which takes as long as eight small updates."""
    monkeypatch.setattr("train.draw", lambda run: "no picture")


@pytest.fixture
def compiler() -> Iterator[None]:
    """Compile afresh, and undo what compiling does to every distribution of the process."""
    import torch._dynamo
    from torch.distributions import Distribution

    torch._dynamo.reset()
    yield
    torch._dynamo.reset()
    Distribution.set_default_validate_args(True)


@pytest.fixture
def flat_policies_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the likeliest tokens of a vocabulary of 8 hold as little probability as they do."""
    monkeypatch.setattr("trpo_optim.tokens.events._LEAST_MASS", 0.0)
