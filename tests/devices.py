"""Where tests run: on the CPU, and on a GPU where there is one."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

__all__ = ["each_device", "manual_seed", "needs_gpu", "random_state", "set_random_state"]

each_device = pytest.mark.parametrize("device", ["cpu", *["cuda"] * torch.cuda.is_available()])

needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU")


def random_state() -> list[Tensor]:
    """Return the state of the CPU's generator and of every GPU's."""
    return [torch.get_rng_state(), *torch.cuda.get_rng_state_all()]


def set_random_state(states: list[Tensor]) -> None:
    """Put them back."""
    torch.set_rng_state(states[0])
    torch.cuda.set_rng_state_all(states[1:])


def manual_seed(seed: int) -> None:
    """Do what ``torch.manual_seed`` does, which without a GPU takes a millisecond for nothing."""
    if torch.cuda.is_available():
        torch.manual_seed(seed)
    else:
        torch.default_generator.manual_seed(seed)
