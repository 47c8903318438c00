"""The recipe for TorchRL learns, from its one-hot actions."""

from __future__ import annotations

import pytest

pytestmark = [
    pytest.mark.recipes,
    pytest.mark.filterwarnings("default"),  # the library's own are not errors here
]
torchrl_loop = pytest.importorskip("torchrl_loop")


def test_it_learns_cart_pole() -> None:
    assert torchrl_loop.main(seed=0) > 350
