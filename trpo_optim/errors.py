"""Every exception that the package raises on purpose, and which closure it blames."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

__all__ = ["NoClosedFormError", "RankError", "RolloutError", "TrustRegionError", "blaming"]


class TrustRegionError(ValueError):
    """Misuse of the optimizer: the text names the cause and the remedy; no state has moved."""


class RankError(TrustRegionError):
    """Another process of the group failed, was lost or has parted; no parameter has moved.

    Attributes:
        lost: Whether a process has left the others, killed, hung or interrupted, so that the group
            is of no more use; otherwise all may go on.
    """

    def __init__(self, text: str, *, lost: bool = False) -> None:
        super().__init__(text)
        self.lost = lost


class NoClosedFormError(TrustRegionError):
    """The KL of two distributions can only be estimated."""


class RolloutError(RuntimeError):
    """An environment failed during a rollout.

    Attributes:
        batch: What was collected before the failure, of the type that was asked for. None if
            nothing was collected.
    """

    def __init__(self, message: str, batch: Any) -> None:
        super().__init__(message)
        self.batch = batch


@contextmanager
def blaming(name: str) -> Iterator[None]:
    """Have a misuse say which of several closures it was found in.

    Args:
        name: Which of a step's closures it is, or empty where there is one.

    Yields:
        Nothing.

    Raises:
        TrustRegionError: The misuse, named.
    """
    try:
        yield
    except TrustRegionError as error:
        if not name:
            raise
        raise TrustRegionError(f"In {name}: {error}") from error
