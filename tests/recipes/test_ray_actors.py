"""The recipe for Ray learns from what two actors collect."""

from __future__ import annotations

import pytest

pytestmark = [
    pytest.mark.recipes,
    pytest.mark.filterwarnings("default"),  # the library's own are not errors here
]
ray_actors = pytest.importorskip("ray_actors")


def test_it_learns_cart_pole() -> None:
    assert ray_actors.main(seed=0) > 350
