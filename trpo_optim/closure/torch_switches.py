"""What PyTorch must be told so that a policy can be differentiated twice."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from trpo_optim.torch_private import compiler_is_imported

__all__ = ["differentiable", "is_recurrence", "uncompiled", "weight_norm", "without_cudnn"]

_RECURRENT = ("lstm", "gru", "rnn_tanh", "rnn_relu")


class _Switch:
    """A switch of the whole process, which the steps of several threads hold together.

    The first holder sets it. The last one to let go puts it back, in whatever order they do so.

    Args:
        setting: Makes a context manager that sets the switch.
    """

    def __init__(self, setting: Callable[[], AbstractContextManager[object]]) -> None:
        self._setting = setting
        self._lock = threading.RLock()
        self._holders: list[object] = []
        self._held: AbstractContextManager[object] | None = None

    @contextmanager
    def __call__(self) -> Iterator[None]:
        """Hold the switch for the length of a ``with`` block.

        Yields:
            Nothing.
        """
        holder = object()
        try:
            self.hold(holder)
            yield
        finally:
            self.release(holder)

    def hold(self, holder: object) -> None:
        """Set the switch, unless somebody holds it.

        Args:
            holder: Who is to let go of it.
        """
        with self._lock:
            self._holders.append(holder)
            if self._held is None:
                held = self._setting()
                held.__enter__()
                self._held = held

    def release(self, holder: object) -> None:
        """Put the switch back, unless somebody else holds it.

        Args:
            holder: Who held it; whoever did not is ignored.
        """
        with self._lock:
            self._holders = [each for each in self._holders if each is not holder]
            if not self._holders and self._held is not None:
                held, self._held = self._held, None
                held.__exit__(None, None, None)


@contextmanager
def _differentiable() -> Iterator[None]:
    fast_path = torch.backends.mha.get_fastpath_enabled()
    try:
        torch.backends.mha.set_fastpath_enabled(False)
        with sdpa_kernel(SDPBackend.MATH), torch.autograd.set_detect_anomaly(False):
            yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fast_path)


@contextmanager
def _without_cudnn() -> Iterator[None]:
    enabled = torch.backends.cudnn.enabled
    try:
        torch.backends.cudnn.enabled = False
        yield
    finally:
        torch.backends.cudnn.enabled = enabled


@contextmanager
def _uncompiled() -> Iterator[None]:
    if not compiler_is_imported():
        yield
        return
    with torch.compiler.set_stance("force_eager"):  # in one line, since to make it is to take it
        yield


differentiable = _Switch(_differentiable)
"""Has attention run by kernels with second derivatives, and anomaly mode raise nothing.

A step holds it from its beginning to its end: another kernel would draw another dropout mask, and
what a checkpoint computes anew in its backward must be what it computed first.
"""

without_cudnn = _Switch(_without_cudnn)
"""Has recurrence run by kernels with second derivatives, not by cuDNN.

Meant for as little as possible: convolutions have their second derivatives in cuDNN, too. Only the
one switch is touched, since cuDNN's others refuse to be read once torch's newer ones for precision
have been set.
"""

uncompiled = _Switch(_uncompiled)
"""Has compiled modules run as they were written.

Their compiled form has no second derivatives, and compiling would trace the watch too. Where
nothing can have been compiled, the compiler stays unimported.
"""


def is_recurrence(func: Callable[..., Any]) -> bool:
    """Return whether a torch function is a recurrence that cuDNN may run.

    Args:
        func: The torch function.
    """
    return getattr(func, "__name__", "") in _RECURRENT


def weight_norm(v: Tensor, g: Tensor, dim: int = 0) -> Tensor:
    """Return what ``torch._weight_norm`` does, with the second derivatives that it lacks on CUDA.

    There torch's own raises no error: it differentiates its gradient with the norms held fixed.

    Args:
        v: The direction of the weight.
        g: Its length, for every index along ``dim``.
        dim: The dimension that the norms are not taken over.
    """
    weight: Tensor = v * (g / torch.norm_except_dim(v, 2, dim))
    return weight
