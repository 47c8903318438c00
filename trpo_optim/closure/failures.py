"""What an exception out of a closure means."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from types import CodeType

import torch
import torch.distributions

from trpo_optim.errors import RankError

__all__ = [
    "ElsewhereError",
    "OutOfStepError",
    "OverflowElsewhereError",
    "is_overflow",
    "is_refusal",
    "needs_graph",
    "passed_through_backward",
]

_OF_TRANSFORMS = (
    "functorch",
    "torch.func",
    "(vjp, jvp, grad, etc)",
    "saved tensor hooks",
    "setup_context",
    "data pointer",
    "TensorWrapper",
)
"""Words in torch's errors that show that a transform of torch.func is the reason."""


class OutOfStepError(RankError):
    """An evaluation of all ranks has ended, and all ranks know."""


class ElsewhereError(OutOfStepError):
    """It has ended on another rank, which says why."""


class OverflowElsewhereError(ElsewhereError):
    """It has ended on another rank, by an overflow."""


def is_refusal(error: BaseException, failure: BaseException | None) -> bool:
    """Return whether an exception is, or follows from, a refusal by torch.

    Args:
        error: What came out of the closure.
        failure: What a call of torch has raised in this evaluation, or None.
    """
    each: BaseException | None = error
    while each is not None:
        if each is failure:
            return True
        if isinstance(each, RuntimeError) and any(words in str(each) for words in _OF_TRANSFORMS):
            return True
        # An error's context may be one that somebody handled long before this evaluation.
        each = each.__cause__ or (each.__context__ if failure is not None else None)
    return False


def is_overflow(error: Exception) -> bool:
    """Return whether an exception is what an overflow looks like to distributions and solvers.

    Args:
        error: What came out of the closure.
    """
    if isinstance(error, OverflowElsewhereError | torch.linalg.LinAlgError):  # type: ignore[attr-defined]  # documented, not in __all__
        return True
    return isinstance(error, ValueError) and _raised_in(error, torch.distributions.__file__)


def needs_graph(error: BaseException) -> bool:
    """Return whether a closure failed since it differentiates inside itself, with gradients off.

    Args:
        error: What came out of the closure.
    """
    return "does not require grad" in str(error)


def passed_through_backward(error: BaseException) -> bool:
    """Return whether an exception came out of a call of backward().

    Args:
        error: What came out of the closure.
    """
    return any(frame is torch.autograd.backward.__code__ for frame in _code_of(error))


def _raised_in(error: BaseException, init_file: str) -> bool:
    """Whether an exception was raised by code in the folder of ``init_file``."""
    *_, innermost = _code_of(error)
    return Path(init_file).parent in Path(innermost.co_filename).parents


def _code_of(error: BaseException) -> Iterator[CodeType]:
    trace = error.__traceback__
    while trace is not None:
        yield trace.tb_frame.f_code
        trace = trace.tb_next
