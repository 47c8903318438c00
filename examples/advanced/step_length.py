"""How long a step of the policy may be: the radius of a task, and how it falls."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import gymnasium as gym
import numpy as np
from torch import Tensor

if TYPE_CHECKING:
    from train import Args
    from training_run import Run


SMALLEST = 2e-6
"""The least radius, in nats: single precision does not resolve KLs below a millionth."""


def joint_radius(args: Args, actions: gym.Space[Any]) -> float:
    """Return the trust-region radius, before any falling: joint over the action's dimensions."""
    return args.max_kl * (math.prod(actions.shape or ()) if args.per_dimension else 1)


def set_length(run: Run, advantages: Tensor) -> None:
    """Set the length of the next step.

    With one radius, noisy advantages move a converged policy as far as informative ones. So below
    ``advantage_floor``, the length of a step goes with the advantages, as a gradient step's does.

    Args:
        run: The run.
        advantages: Those of the batch, (T, N), in units of the returns.
    """
    args, share = run.args, 1.0
    if args.anneal_steps is not None:
        left = (args.anneal_steps - run.step) / (args.anneal_steps - args.anneal_start)
        share = min(left, 1.0)
    if args.advantage_floor:
        spread = math.sqrt(np.mean(run.processes.all(float(advantages.var()))))
        share *= min(spread / args.advantage_floor, 1.0)
    share = max(share, 1e-3)  # a rate is positive
    for group in run.optimizer.param_groups:
        # a step's length goes with the radius' root
        start = run.optimizer.defaults["max_kl"]
        group["max_kl"] = max(start * share**2, min(start, SMALLEST))
        if args.mode == "vanilla":
            group["lr"] = run.optimizer.defaults["lr"] * share
