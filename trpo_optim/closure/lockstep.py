"""Evaluations in which ranks send to each other: each learns whether the others go on."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Protocol

from trpo_optim.closure.failures import OutOfStepError, is_overflow

__all__ = ["Lockstep", "told"]


class Lockstep(Protocol):
    """How ranks that evaluate together learn of each other."""

    def done(self) -> None:
        """Say that this rank's evaluation has ended."""

    def failed(self, *, overflow: bool) -> None:
        """Say that this rank's evaluation has raised."""

    def everywhere(self, flag: bool, /) -> bool:
        """Return whether a flag is true on all ranks."""


@contextmanager
def told(lockstep: Lockstep | None, *, overflow: bool = False) -> Iterator[None]:
    """Say how this rank's evaluation ends.

    Args:
        lockstep: The other ranks. None: nobody waits.
        overflow: Whether an overflow counts as values that are no numbers.

    Yields:
        Nothing.

    Raises:
        OutOfStepError: If it has raised on another rank, or has not ended there.
    """
    if lockstep is None:
        yield
        return
    try:
        yield
    except OutOfStepError:
        raise
    except BaseException as error:
        overflown = isinstance(error, Exception) and is_overflow(error)
        lockstep.failed(overflow=overflow and overflown)
        raise
    lockstep.done()
