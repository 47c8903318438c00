"""How the numbers of several processes become one: sums over a process group, all or none."""

from __future__ import annotations

import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from trpo_optim.closure.failures import ElsewhereError
from trpo_optim.errors import RankError, TrustRegionError
from trpo_optim.torch_private import held_elsewhere

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

if dist.is_available():
    # Its functions take group.WORLD, as it is at the import, for a default. Every optimizer of
    # torch imports it: after init_process_group(), it would hold that group to the end.
    import torch.distributed.nn.functional  # noqa: F401

__all__ = ["GROUP_DESTROYED", "GROUP_NOT_COPIED", "Reduction", "require_member"]

_Result = TypeVar("_Result")

_RAISED, _INTERRUPTED = 1, 2

_sent: list[Tensor] = []
"""The last buffer that was sent, and earlier ones that Gloo's threads still hold. A thread lets go
of a buffer a little after its end. Were it the last to do so, it would wait for Python's lock,
which ``destroy_process_group()`` of torch 2.6 holds while it waits for that thread."""

GROUP_DESTROYED = (
    "The process_group was destroyed. Set process_group to another group, or to None to go on in "
    "this process alone."
)

GROUP_NOT_COPIED = (
    "An optimizer with a process_group can be neither pickled nor copied, since the group belongs "
    "to this process. Save its state_dict(), or set process_group to None first and restore it "
    "afterwards."
)


class Reduction:
    """The collectives of one call; every result is the same on all ranks, bit for bit.

    All are sums of one buffer (``all_reduce``), in which every rank has a place of its own for what
    must not be added up. There it also says whether its own part raised, so that no rank waits for
    one that has left: then all raise.

    Args:
        group: The processes.
        device: Where the buffers lie: that of the parameters. None: where the group can send from.
        call: What the ranks do together, for messages.

    Attributes:
        size: How many ranks there are.
        rank: Which of them this process is.

    Raises:
        TrustRegionError: If the group cannot send what lies there.
    """

    def __init__(
        self, group: ProcessGroup, device: torch.device | None = None, call: str = "The step"
    ) -> None:
        try:
            backends = str(dist.get_backend_config(group))
        except Exception as error:  # whatever torch makes of a group that it does not know
            raise TrustRegionError(GROUP_DESTROYED) from error
        if device is None:
            device = torch.device("cpu" if "cpu:" in backends else backends.split(":")[0])
        elif f"{device.type}:" not in backends:
            raise TrustRegionError(
                f"The parameters lie on {device}, and the process_group serves {backends}. Move "
                "the policy, or make the group with a backend for its device: gloo for the CPU, "
                "NCCL for CUDA."
            )
        self.size = dist.get_world_size(group)
        self.rank = dist.get_rank(group)
        self._group = group
        self._device = device
        self._call = call

    def rows(self, work: Callable[[], Sequence[float]], width: int) -> list[list[float]]:
        """Return every rank's row of numbers, in double precision.

        Args:
            work: Makes this rank's row.
            width: How many numbers it holds.

        Returns:
            The rows, in the order of the ranks.

        Raises:
            RankError: If a rank raised, or was lost. A rank that raised does so again.
        """
        own, error = _attempted(work)
        table = torch.zeros(self.size, 1 + width, dtype=torch.float64, device=self._device)
        if own is not None:
            table[self.rank, 1:] = torch.tensor(own, dtype=torch.float64)
        table[self.rank, 0] = _status(error)
        self._add_up_with(table, error)
        found = table.tolist()
        self._raise_together(error, [row[0] for row in found])
        return [row[1:] for row in found]

    def same(self, work: Callable[[], _Result]) -> _Result:
        """Return what this rank's part gives, once it is known that no rank raised.

        Args:
            work: Makes it.

        Raises:
            RankError: If a rank raised, or was lost. A rank that raised does so again.
        """
        made: list[_Result] = []

        def row() -> list[float]:
            made.append(work())
            return []

        self.rows(row, 0)
        return made[0]

    def each(self, own: float) -> list[float]:
        """Return every rank's number, in the order of the ranks; none may have raised.

        Args:
            own: This rank's.

        Raises:
            RankError: If a rank was lost.
        """
        table = torch.zeros(self.size, dtype=torch.float64, device=self._device)
        table[self.rank] = own
        self.add_up(table)
        return table.tolist()

    def total(self, work: Callable[[], Tensor | None], length: int, dtype: torch.dtype) -> Tensor:
        """Return the sum of every rank's vector, by one collective.

        Args:
            work: Makes this rank's vector, shape (length,); None counts as zeros.
            length: How long it is.
            dtype: Its type.

        Returns:
            The sum, shape (length,).

        Raises:
            RankError: If a rank raised, or was lost. A rank that raised does so again.
        """
        own, error = _attempted(work)
        buffer = torch.zeros(length + self.size, dtype=dtype, device=self._device)
        if own is not None:
            buffer[:length] = own
        buffer[length + self.rank] = _status(error)
        self._add_up_with(buffer, error)
        self._raise_together(error, buffer[length:].tolist())
        return buffer[:length]

    def texts(self, own: str) -> list[str]:
        """Return every rank's text, in the order of the ranks; for the rare case.

        Args:
            own: This rank's.

        Raises:
            RankError: If a rank was lost.
        """
        found = [""] * self.size
        with _within_time():
            dist.all_gather_object(found, own, group=self._group)
        return found

    def name(self, rank: int) -> str:
        """Return what a rank of the group is called, by its number among all processes."""
        return f"rank {dist.get_global_rank(self._group, rank)}"

    def add_up(self, buffer: Tensor) -> None:
        """Replace a buffer by the sum of the buffers of all ranks; none may have raised.

        Args:
            buffer: Of one shape and type on all ranks.

        Raises:
            RankError: If a rank was lost.
        """
        _sent[:] = [*(each for each in _sent if held_elsewhere(each)), buffer]
        with _within_time():
            dist.all_reduce(buffer, group=self._group)

    def _add_up_with(self, buffer: Tensor, error: BaseException | None) -> None:
        """Add up; if another rank was lost, what this rank itself raised is named as the cause."""
        try:
            self.add_up(buffer)
        except RankError as lost:
            if error is None:
                raise
            raise lost from error

    def _raise_together(self, error: BaseException | None, raised: Sequence[float]) -> None:
        if not any(raised):
            return
        texts = self.texts(_described(error) if _status(error) else "")
        if error is not None and not isinstance(error, ElsewhereError):
            raise error
        whose = "; ".join(
            f"{self.name(rank)} raised {text}" for rank, text in enumerate(texts) if text
        )
        raise RankError(
            f"{self._call} failed on another rank, and no rank has moved: {whose}",
            lost=max(raised) == _INTERRUPTED,
        )


def require_member(group: ProcessGroup | None) -> None:
    """Check that a process group is one, with this process in it.

    Args:
        group: The group, or None.

    Raises:
        TrustRegionError: If it is not.
    """
    if group is not None and not isinstance(group, dist.ProcessGroup):
        raise TrustRegionError(
            f"process_group is {group!r}, not a ProcessGroup with this process in it. Call "
            "torch.distributed.init_process_group() and pass torch.distributed.group.WORLD, or "
            "the result of new_group() on a rank of the group. On other ranks new_group() returns "
            "-100, and they take no step."
        )


def _attempted(work: Callable[[], _Result]) -> tuple[_Result | None, BaseException | None]:
    """Return what a rank's own part gives, or what it raises, an interrupt too."""
    try:
        return work(), None
    except BaseException as error:
        return None, error


def _status(error: BaseException | None) -> int:
    """Return what a rank says of its own part."""
    if error is None or isinstance(error, ElsewhereError):
        return 0
    return _RAISED if isinstance(error, Exception) else _INTERRUPTED


def _described(error: BaseException | None) -> str:
    """Return an exception's type and text, whatever its ``__str__`` does."""
    return "".join(traceback.format_exception_only(error)).strip()


@contextmanager
def _within_time() -> Iterator[None]:
    try:
        yield
    except RuntimeError as error:
        raise RankError(
            "Another rank was lost, did not arrive within the group's timeout, or did not make the "
            "same calls of step() and policy_closure(). The parameters have not moved, and the "
            "process group can no longer be used. End this process, and start all ranks again from "
            "the last checkpoint, as torchrun does with --max-restarts.\n"
            f"{error}",
            lost=True,
        ) from error
