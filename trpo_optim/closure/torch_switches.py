"""What PyTorch must be told so that a policy can be differentiated twice, and what it cannot do."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from trpo_optim.torch_private import compiler_is_imported

__all__ = ["attention", "is_recurrence", "remedy", "uncompiled", "weight_norm", "without_cudnn"]

_RECURRENT = ("lstm", "gru", "rnn_tanh", "rnn_relu")

_REMEDIES = {
    "embedding_bag": "nn.EmbeddingBag has no second derivatives: use nn.Embedding, and the sum or "
    "mean of its output over the bag.",
    "attention": "The closure asks for an attention kernel that has no second derivatives: drop "
    "its sdpa_kernel() or flex_attention(), and the optimizer chooses one that has.",
    "use_reentrant": "Reentrant checkpointing has no second derivatives: use "
    "checkpoint(..., use_reentrant=False).",
    "_cudnn_rnn": "A traced module runs a cuDNN recurrence, which has no second derivatives: call "
    "step() under torch.backends.cudnn.flags(enabled=False).",
    "grid_sampler": "functional.grid_sample has no second derivatives: use a convolution, or "
    "interpolate().",
    "dist_backward": "torch.cdist and pdist have no second derivatives: write the distances out.",
}
"""By a part of torch's message."""


@contextmanager
def attention() -> Iterator[None]:
    """Have attention run by kernels with second derivatives; afterwards all is as it was.

    Every evaluation of a step runs them, since another kernel would draw another dropout mask.

    Yields:
        Nothing.
    """
    fast_path = torch.backends.mha.get_fastpath_enabled()
    try:
        torch.backends.mha.set_fastpath_enabled(False)
        with sdpa_kernel(SDPBackend.MATH):
            yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fast_path)


def is_recurrence(func: Callable[..., Any]) -> bool:
    """Return whether a torch function is a recurrence that cuDNN may run.

    Args:
        func: The torch function.
    """
    return getattr(func, "__name__", "") in _RECURRENT


@contextmanager
def without_cudnn() -> Iterator[None]:
    """Have recurrence run by kernels with second derivatives, not by cuDNN.

    Meant for as little as possible: convolutions have their second derivatives in cuDNN, too. Only
    the one switch is touched, since cuDNN's others refuse to be read once torch's newer ones for
    precision have been set.

    Yields:
        Nothing.
    """
    enabled = torch.backends.cudnn.enabled
    try:
        torch.backends.cudnn.enabled = False
        yield
    finally:
        torch.backends.cudnn.enabled = enabled


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


@contextmanager
def uncompiled() -> Iterator[None]:
    """Have compiled modules run as they were written; afterwards all is as it was.

    Their compiled form has no second derivatives, and compiling would trace the watch too. Where
    nothing can have been compiled, the compiler stays unimported.

    Yields:
        Nothing.
    """
    if not compiler_is_imported():
        yield
        return
    with torch.compiler.set_stance("force_eager"):  # in one line, since to make it is to take it
        yield


def remedy(refusal: str) -> str:
    """Return what to do about an operation that torch cannot differentiate twice.

    Args:
        refusal: Torch's own words.
    """
    known = (text for part, text in _REMEDIES.items() if part in refusal)
    return next(known, "Replace the operation that this names by one with second derivatives.")
