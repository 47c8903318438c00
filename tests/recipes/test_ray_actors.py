"""The recipe for Ray learns from what two actors collect."""

from __future__ import annotations

import os
import sys

import pytest

pytestmark = [
    pytest.mark.recipes,
    pytest.mark.filterwarnings("default"),  # the library's own are not errors here
]
ray_actors = pytest.importorskip("ray_actors")


def test_it_learns_cart_pole(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(sys.path))  # the actors import the recipe
    assert ray_actors.main(seed=0) > 350
