"""Every private name of torch that the package stands on, in one place.

All of them were tried with torch 2.6, 2.13 and 2.14: ``make test-floor``, ``make test`` and
``make test-newest``. Check a new release of torch against this file first.

Some are attributes, which cannot be imported:

- ``node._saved_*``, ``node._forward_cls``, ``node._input_metadata`` and ``node._sequence_nr()`` of
  autograd nodes, in ``curvature``, ``closure.kept_tensors`` and ``testing.argument_checks``;
- ``parameter._backward_hooks`` and ``parameter._post_accumulate_grad_hooks``, in
  ``closure.transaction``;
- ``module._buffers``, in ``closure.transaction``;
- ``_indices()`` and ``_values()`` of sparse tensors, in ``closure.contents``;
- the names of torch functions, such as ``__set__`` of ``Tensor.data``, in
  ``closure.interception``;
- ``_categorical`` of ``OneHotCategorical``, ``_param`` of ``Categorical``, ``Bernoulli`` and
  ``Binomial``, ``_unbroadcasted_*`` of the multivariate normals and ``Wishart``, and
  ``_cached_x_y`` and ``_inv`` of transforms, in ``distributions``;
- ``_validate_args`` of ``Distribution``, in ``testing.argument_checks``;
- ``_is_root``, ``_state_ctx.all_states``, ``_fsdp_param_groups`` and ``_unsharded_param`` of FSDP's
  states and parameters, and what its groups of parameters are set to, in ``closure.fsdp`` and
  ``distributed.fsdp``; from torch 2.13 on.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch._C import _DisableFuncTorch as outside_transforms
from torch._C import _swap_tensor_impl as swap_contents
from torch._C._autograd import _get_sequence_nr as autograd_clock
from torch._C._functorch import _grad_decrement_nesting, get_unwrapped
from torch._C._functorch import is_functorch_wrapped_tensor as is_transformed
from torch._C._functorch import maybe_current_level as _maybe_current_level
from torch._compile import _disable_dynamo as never_compiled
from torch._ops import OpOverload, OpOverloadPacket
from torch.autograd.grad_mode import _unsafe_preserve_version_counter as version_kept
from torch.distributions.kl import _dispatch_kl as kl_rule
from torch.distributions.kl import _kl_transformed_transformed as kl_of_bases
from torch.distributions.multivariate_normal import _batch_mahalanobis as squared_distance
from torch.distributions.transforms import _InverseTransform as InverseTransform
from torch.overrides import _get_current_function_mode as current_mode
from torch.overrides import _pop_mode as pop_mode

__all__ = [
    "InverseTransform",
    "OpOverload",
    "autocast_put_back",
    "autograd_clock",
    "compiler_is_imported",
    "copy_each",
    "current_mode",
    "fsdp_states",
    "held_elsewhere",
    "is_transformed",
    "kl_of_bases",
    "kl_rule",
    "may_draw",
    "mps_generator",
    "never_compiled",
    "norm_of_each",
    "outside_transforms",
    "own_again",
    "pop_mode",
    "saves_by_hooks",
    "squared_distance",
    "storage_of",
    "swap_contents",
    "transforms_undone",
    "untransformed",
    "version_kept",
    "weight_norm",
]

_PYTHON_THAT_DRAWS = {"multi_head_attention_forward", "gumbel_softmax", "lstm", "gru"}
"""Functions that call others which draw, and have no tag."""

_hooks: Callable[[bool], Any] | None = getattr(
    torch._C._autograd, "_top_saved_tensors_default_hooks", None
)

copy_each = torch._foreach_copy_
norm_of_each = torch._foreach_norm
weight_norm = torch._weight_norm


@cache
def may_draw(func: Callable[..., Any]) -> bool:
    """Return whether a torch function may draw random numbers, by torch's own tags.

    Args:
        func: What ``__torch_function__`` is given.
    """
    name = getattr(func, "__name__", "").partition(".")[0]
    if name in _PYTHON_THAT_DRAWS:
        return True
    packet = getattr(torch.ops.aten, name, None) if name else None
    return isinstance(packet, OpOverloadPacket) and any(
        torch.Tag.nondeterministic_seeded in getattr(packet, overload).tags
        for overload in packet.overloads()
    )


def untransformed(tensor: Tensor) -> Tensor:
    """Return what the wrappers of torch.func hold.

    Args:
        tensor: In as many wrappers as there are transforms, or in none.
    """
    while is_transformed(tensor):
        tensor = get_unwrapped(tensor)
    return tensor


own_again: Callable[[Tensor], None] = Tensor._fix_weakref  # type: ignore[attr-defined]  # no stub
"""Has Python own a tensor that a weak reference gave back.

If only a graph held the tensor, C++ owns its Python object. Up to torch 2.9, whoever reads a weak
reference must take the object back, or the memory may be freed twice.
"""


def mps_generator() -> torch.Generator:
    """Return the generator that random numbers on MPS are drawn from."""
    return torch.mps._get_default_mps_generator()


@contextmanager
def transforms_undone() -> Iterator[None]:
    """Leave no transform of torch.func open, should an interrupt keep torch from closing it.

    Yields:
        Nothing.
    """
    before = _maybe_current_level() or 0
    try:
        yield
    finally:
        while (_maybe_current_level() or 0) > before:
            _grad_decrement_nesting()


def autocast_put_back(device: torch.device) -> Callable[[], None]:
    """Return what ends the autocast blocks of this thread that an interrupt has kept from ending.

    Args:
        device: Where the blocks compute.
    """
    depth = _autocast_depth()
    known = torch.amp.is_autocast_available(device.type)
    enabled = known and torch.is_autocast_enabled(device.type)

    def put_back() -> None:
        while _autocast_depth() > depth:
            torch.autocast_decrement_nesting()
        if known:
            torch.set_autocast_enabled(device.type, enabled)

    return put_back


def _autocast_depth() -> int:
    """Return in how many autocast blocks this thread is."""
    # On one line, so that an interrupt leaves no increment behind.
    return torch.autocast_decrement_nesting() if torch.autocast_increment_nesting() else 0


def saves_by_hooks() -> bool:
    """Return whether autograd saves its tensors by hooks now, as inside ``checkpoint()``.

    Torch up to 2.6 does not say.
    """
    return _hooks is not None and _hooks(False) is not None


def storage_of(tensor: Tensor) -> int:
    """Return what tells a tensor's storage from others, even while its memory is freed.

    Args:
        tensor: Strided.
    """
    place: int = tensor.untyped_storage()._cdata
    return place


def held_elsewhere(tensor: Tensor) -> bool:
    """Return whether something in C++ holds a tensor, besides its Python object."""
    held: bool = tensor._use_count() > 1  # type: ignore[attr-defined]  # no stub
    return held


def compiler_is_imported() -> bool:
    """Return whether something can have been compiled."""
    return "torch._dynamo" in sys.modules


def fsdp_states() -> list[tuple[Any, Any]]:
    """Return the modules of this process that ``fully_shard`` took, each with its state."""
    kind = getattr(sys.modules.get("torch.distributed.fsdp"), "FSDPModule", None)
    if kind is None or torch.__version__ < "2.13":  # before, parameters in parts are refused
        return []
    known = sys.modules["torch.distributed._composable_state"]._module_state_mapping
    modules: list[Any] = [each for each in known if isinstance(each, kind)]
    return [(each, each._get_fsdp_state()) for each in modules]
