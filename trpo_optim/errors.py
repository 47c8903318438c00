"""Every exception that the package raises on purpose."""

from __future__ import annotations

__all__ = ["NoClosedFormError", "RankError", "TrustRegionError"]


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
