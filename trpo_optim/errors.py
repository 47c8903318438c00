"""Every exception that the package raises on purpose, and which closure it blames."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

__all__ = ["NoClosedFormError", "RankError", "RolloutError", "TrustRegionError", "blaming"]


class TrustRegionError(ValueError):
    """Misuse of the optimizer. The text names the cause and the remedy, and no state has moved.

    Example:
        >>> import torch
        >>> from trpo_optim import TrustRegionError, TrustRegionOptimizer
        >>> try:
        ...     TrustRegionOptimizer([torch.zeros(1, requires_grad=True)], cg_iterations=0)
        ... except TrustRegionError as error:
        ...     print(error)
        cg_iterations is 0; it must be a whole number of at least 1.
    """


class RankError(TrustRegionError):
    """Another process of the group failed, was lost or differs. No parameter has moved.

    Attributes:
        lost: Whether a process was killed, hangs or was interrupted. Then the group can no longer
            be used: start all ranks again from the last checkpoint. Otherwise all may go on.

    Example:
        >>> from trpo_optim import RankError
        >>> try:  # around optimizer.step(closure), on every rank
        ...     raise RankError("The step failed on another rank.", lost=False)
        ... except RankError as error:
        ...     if error.lost:
        ...         raise
        ...     print("skipped:", error)
        skipped: The step failed on another rank.
    """

    def __init__(self, text: str, *, lost: bool = False) -> None:
        super().__init__(text)
        self.lost = lost


class NoClosedFormError(TrustRegionError):
    """The KL of two distributions can only be estimated."""


class RolloutError(RuntimeError):
    """An environment failed during a rollout.

    Attributes:
        batch: The data from before the failure, in the type that the rollout returns. None if there
            are none.

    Example:
        >>> import gymnasium as gym, torch
        >>> from torch.distributions import Categorical
        >>> from trpo_optim.rollouts import RolloutError, single_path
        >>> class Failing(gym.Wrapper):
        ...     def step(self, action):
        ...         raise OSError("simulator lost")
        >>> envs = gym.vector.SyncVectorEnv([lambda: Failing(gym.make("CartPole-v1"))])
        >>> try:
        ...     single_path(envs, lambda seen: Categorical(logits=torch.zeros(1, 2)), steps=4)
        ... except RolloutError as error:
        ...     print(error.batch)
        None
    """

    def __init__(self, message: str, batch: Any) -> None:
        super().__init__(message)
        self.batch = batch


@contextmanager
def blaming(name: str) -> Iterator[None]:
    """Name the closure that a misuse was found in.

    Args:
        name: Which of the step's closures it is. Empty if there is only one.

    Yields:
        Nothing.

    Raises:
        TrustRegionError: The misuse, named.
    """
    try:
        yield
    except TrustRegionError as error:
        if not name or isinstance(error, RankError):
            raise
        raise TrustRegionError(f"In {name}: {error}") from error
