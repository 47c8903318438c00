"""Random Markov decision processes and policies."""

from __future__ import annotations

import torch
from hypothesis import strategies as st
from torch import Tensor

from trpo_optim.theory import (
    TabularMDP,
    random_mdp,
)

SEEDS = st.integers(0, 2**31 - 1)
MDPS = st.builds(random_mdp, st.integers(1, 6), st.integers(1, 4), st.floats(0.0, 0.97), SEEDS)


def random_policy(mdp: TabularMDP, seed: int, sharpness: float = 1.0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    noise = torch.randn(mdp.rewards.shape, generator=generator, dtype=torch.float64)
    return (sharpness * noise).softmax(1)
