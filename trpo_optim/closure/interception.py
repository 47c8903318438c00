"""What is looked at while a closure runs: parameters, shared memory, random numbers."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils.hooks import RemovableHandle

from trpo_optim import torch_private
from trpo_optim.closure.dtensor import local
from trpo_optim.closure.fsdp import FsdpParameters
from trpo_optim.closure.shared_memory import Spans, is_plain
from trpo_optim.closure.torch_switches import is_recurrence, weight_norm, without_cudnn
from trpo_optim.closure.transaction import Transaction
from trpo_optim.errors import TrustRegionError
from trpo_optim.torch_private import (
    current_mode,
    is_transformed,
    may_draw,
    pop_mode,
    saves_by_hooks,
    storage_of,
)

__all__ = ["RefusedError", "Watch"]


_DATA: Any = getattr(Tensor.data, "__get__")  # noqa: B009 (mypy sees a property)
_SET_DATA: Any = getattr(Tensor.data, "__set__")  # noqa: B009 (as above)

_GRAD_FN: Any = getattr(Tensor.grad_fn, "__get__")  # noqa: B009 (as above)
_HOOKS = (Tensor.register_hook, Tensor.register_post_accumulate_grad_hook)

_HALF = (torch.float16, torch.bfloat16)

_SPECIAL = {_SET_DATA, _DATA, _GRAD_FN, *_HOOKS, torch.autograd.grad, torch_private.weight_norm}
"""What is called in another way than the closure asks for, or shows something of it."""


class RefusedError(Exception):
    """torch.func does not serve a closure; the text is the reason."""


class _NodeWithoutHooks:
    """An autograd node on which no hook can be registered."""

    def __init__(self, node: Any) -> None:
        self._node = node

    def __getattr__(self, name: str) -> Any:
        return _not_registered if name.startswith("register_") else getattr(self._node, name)


def _not_registered(*_arguments: Any, **_options: Any) -> RemovableHandle:
    """Stand in for the registration of a hook: it changes neither the loss nor the KL."""
    return RemovableHandle(OrderedDict())


class Watch(TorchFunctionMode):
    """Replaces parameters by their twins in every torch call, and looks at what else comes in.

    Hooks on tensors and on autograd nodes are not registered: a step is that of the loss and the
    KL, which no hook changes.

    It looks for tensors from outside the closure that share a parameter's memory, which every trial
    would move.

    Args:
        transaction: Told of every tensor that is made.
        parameters: The optimizer's parameters.
        twins: What stands in for a parameter, by the parameter's ``id``.
        fsdp: The optimizer's parameters, if FSDP has sharded them; else None.

    Attributes:
        recurrent: Whether a recurrence was run.
        interfered: Whether a call did other than what the closure asked for.
        dear: What makes second derivatives dear, as far as calls show it, or empty.
        precision: The unit of rounding of half-precision results, if there were any.
        differentiates: Whether the closure took a gradient itself.
        failure: What a torch call raised last, or None.
        drew: Whether a torch call moved the random state, while there were twins.
    """

    def __init__(
        self,
        transaction: Transaction,
        parameters: Sequence[Tensor],
        twins: Mapping[int, Tensor],
        fsdp: FsdpParameters | None = None,
    ) -> None:
        super().__init__()
        self.recurrent = self.interfered = False
        self.dear = ""
        self.differentiates = False
        self.precision = 0.0
        self.failure: Exception | None = None
        self.drew = False
        self._paused = False
        self._transaction = transaction
        self._kept = transaction.kept
        self._since = self._kept.count()
        self._twins = twins
        self._own = {*map(id, parameters), *map(id, twins.values())}
        whole = [] if fsdp is None else fsdp.gathered()
        self._gathered = set(map(storage_of, whole))
        self._own |= set(map(id, whole))
        held = [(each, local(each)) for each in parameters]
        self._spans = Spans(own for _, own in held)
        self._parts = {  # the storages of DTensor parameters
            own.untyped_storage().data_ptr() for each, own in held if own is not each
        }

    def remove(self) -> None:
        """Leave torch's stack of modes, should an interrupt have kept ``with`` from doing so."""
        if current_mode() is self:
            pop_mode()

    def before_forward(self, module: nn.Module) -> None:
        """Have the transaction remember a module that is about to run, without watching that.

        Args:
            module: Called by the closure.
        """
        self._paused = True
        try:
            self._transaction.policy.hold_running(module)
        finally:
            self._paused = False

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        """Call ``func`` on the twins."""
        keywords = kwargs or {}
        if self._paused:
            return func(*args, **keywords)
        if self._twins or _is_special(func):
            return self._intervened(func, args, keywords)
        self._look_at(args)
        if keywords:
            self._look_at(tuple(keywords.values()))
        return self._noted(func(*args, **keywords))

    def _intervened(
        self, func: Callable[..., Any], args: tuple[Any, ...], keywords: dict[str, Any]
    ) -> Any:
        """Call ``func`` on the twins, or do in its place what leaves the derivatives right."""
        if func == _SET_DATA and not self._transaction.policy.remembers(args[0]):
            raise TrustRegionError(
                "The closure assigns to the .data of a tensor, which derivatives cannot follow. "
                "Write in place instead, with copy_()."
            )
        if func in _HOOKS and not _is_of_fsdp(*args[1:], *keywords.values()):
            self.interfered = True
            return _not_registered()
        self.differentiates |= func is torch.autograd.grad
        if self._twins:
            func = _within_transforms(func, args, keywords)
        if func is torch_private.weight_norm:
            func = weight_norm
        recurrent = is_recurrence(func)
        self.recurrent |= recurrent
        self.dear = self.dear or ("recurrence" if recurrent else "")
        self._look_at(args)
        self._look_at(tuple(keywords.values()))
        arguments = [self._replaced(value) for value in args]
        named = {name: self._replaced(value) for name, value in keywords.items()}
        state = self._transaction.random_states() if self._twins and may_draw(func) else None
        try:
            with without_cudnn() if recurrent else nullcontext():
                result = func(*arguments, **named)
        except Exception as error:
            self.failure = error
            raise
        if state is not None and not all(
            map(torch.equal, self._transaction.random_states(), state)
        ):
            self.drew = True
        if func == _GRAD_FN:
            self.interfered |= result is not None
            return result if result is None else _NodeWithoutHooks(result)
        return self._noted(result)

    def _look_at(self, values: Sequence[Any]) -> None:
        """Note the tensors that a call is given, and refuse those that share parameters' memory."""
        for value in values:
            if isinstance(value, Tensor):
                if id(value) not in self._own:
                    if self._shares_memory(value) and not self._kept.holds(value, self._since):
                        self._refuse(value)
                    self._kept.add(value)
            elif isinstance(value, list | tuple):
                self._look_at(value)

    def _refuse(self, tensor: Tensor) -> None:
        """Refuse a tensor from outside that every trial would move."""
        if tensor.untyped_storage().data_ptr() in self._parts:
            raise TrustRegionError(
                "The closure takes what this rank holds of a DTensor parameter past the copy that "
                "the step differentiates. clone() the parameter first, inside the closure: "
                "parameter.clone().full_tensor(), or to_local() likewise. An old distribution that "
                "holds such a part needs a clone() of it."
            )
        raise TrustRegionError(
            "The closure uses a tensor from outside that shares memory with a parameter, such as "
            "the scale of the old distribution: it would move with every trial. clone() it when "
            "the old distribution is made."
        )

    def _noted(self, result: Any) -> Any:
        """Note the tensors that a call has made."""
        for each in result if isinstance(result, tuple | list) else (result,):
            if isinstance(each, Tensor):
                if each.dtype in _HALF:
                    self.precision = max(self.precision, torch.finfo(each.dtype).eps)
                if id(each) not in self._own:
                    self._kept.add(each)
        if not self.dear and saves_by_hooks():
            self.dear = "checkpoints and other hooks on saved tensors"
        return result

    def _replaced(self, value: Any) -> Any:
        """Return the twin of a parameter, and of a list or tuple what holds twins."""
        if isinstance(value, Tensor):
            return self._twins.get(id(value), value)
        if type(value) in (list, tuple):
            return type(value)(self._replaced(each) for each in value)
        return value

    def _shares_memory(self, tensor: Tensor) -> bool:
        """Whether a plain tensor overlaps a parameter; what torch traces through has no memory."""
        if not is_plain(tensor) or is_transformed(tensor):
            return False
        if self._gathered and storage_of(tensor) in self._gathered:
            return True
        return self._spans.touch(tensor)


@cache
def _is_special(func: Callable[..., Any]) -> bool:
    return func in _SPECIAL or is_recurrence(func)


def _within_transforms(
    func: Callable[..., Any], args: tuple[Any, ...], keywords: dict[str, Any]
) -> Callable[..., Any]:
    """Return what to call in place of a function, or refuse what torch.func gets wrong."""
    if func == _SET_DATA:
        raise RefusedError("the closure assigns to the .data of a tensor")
    if func == Tensor.detach_:
        raise RefusedError("the closure calls detach_(), which cuts only one of two derivatives")
    if func is torch.autograd.grad and _of_outsiders(*args, **keywords):
        raise RefusedError("the closure differentiates with respect to a tensor from outside")
    # A transform of torch.func cuts .data at its own level, and detach() at all of them.
    return Tensor.detach if func == _DATA else func


def _is_of_fsdp(*arguments: Any) -> bool:
    """Whether a hook is one by which FSDP gathers parameters and adds up gradients."""
    owners = [type(getattr(each, "__self__", None)) for each in arguments]
    return any(each.__module__.startswith("torch.distributed.fsdp") for each in owners)


def _of_outsiders(
    _outputs: Any, inputs: Tensor | Sequence[Tensor], *_others: Any, **_options: Any
) -> bool:
    """Whether a gradient is asked for in tensors that no transform of torch.func knows."""
    return not all(map(is_transformed, [inputs] if isinstance(inputs, Tensor) else inputs))
