"""What belongs to the policy besides its parameters: the tensors that its modules hold."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from trpo_optim.closure.dtensor import local
from trpo_optim.closure.holders import LONGEST, attributes, holders, is_plain_object
from trpo_optim.errors import TrustRegionError
from trpo_optim.torch_private import is_transformed, outside_transforms

__all__ = ["PolicyState"]

_LARGEST = 2**18
"""Frozen parameters of more elements are not copied; to write one is an error."""

_DEEPEST = 3
"""How many lists and dicts inside of each other are looked into."""


_OF_EVERY_MODULE = {*vars(nn.Module()), "_is_full_backward_hook"} - {"training"}
"""What torch itself keeps in a module: hooks, submodules, buffers and parameters."""


class PolicyState:
    """The tensors of a policy, as they were before the step.

    To the policy belong the modules that hold one of the optimizer's parameters, with all modules
    inside of them, and every other module that runs in an evaluation. A plain object, a dict or a
    list that holds a parameter counts as such a module. Of each of these, what is put back are the
    buffers, the frozen parameters, the tensors and random generators among the attributes (also in
    lists, dicts and plain objects there), and the training mode. Numbers beside a tensor are put
    back if the tensor was moved, since a count goes with a running mean.

    Args:
        parameters: The optimizer's own, which the transaction puts back.
    """

    def __init__(self, parameters: Iterable[Tensor]) -> None:
        self._own = set(map(id, parameters))
        self._seen: dict[int, Any] = {}  # which also keeps their ids from being used again
        self._contents: dict[int, _Content] = {}
        self._places: list[_Place] = []
        self._generators: list[tuple[torch.Generator, Tensor]] = []

    def hold_what_has_parameters(self, closures: Iterable[Callable[..., Any]]) -> None:
        """Remember all that belongs to the policy before any evaluation.

        Args:
            closures: From which it is reached.
        """
        for holder in holders(closures, self._own):
            if isinstance(holder, nn.Module):
                for module in holder.modules():
                    self._hold_module(module, named=True)
            elif isinstance(holder, dict | list | tuple | deque):
                self._hold(holder, type(holder).__name__)
            else:
                self._hold(attributes(holder), type(holder).__name__)

    def hold_running(self, module: nn.Module) -> None:
        """Remember a module that is about to run, unless it is known.

        Args:
            module: ``functional_call`` may have put stand-ins in the place of its buffers. So the
                buffers' contents are remembered, and not their names.
        """
        if id(module) not in self._seen:
            with outside_transforms():
                for each in module.modules():
                    self._hold_module(each, named=False)

    def other_parameters(self) -> list[Tensor]:
        """Return the parameters that are not the optimizer's and require gradients."""
        tensors = [content.tensor for content in self._contents.values()]
        return [each for each in tensors if isinstance(each, nn.Parameter) and each.requires_grad]

    def rewind(self) -> None:
        """Put everything back, as far as each can be.

        Raises:
            TrustRegionError: If a large frozen parameter was written.
            RuntimeError: If torch refuses to write a tensor.
        """
        moved: set[int] = set()
        errors: list[Exception] = []
        for key, content in reversed(self._contents.items()):  # the first of two aliases wins
            with _collected(errors):
                if content.rewind():
                    moved.add(key)
        for place in self._places:
            place.rewind(moved)
        for generator, state in self._generators:
            generator.set_state(state)
        if errors:
            raise errors[0]

    def _hold_module(self, module: nn.Module, *, named: bool) -> None:
        if id(module) in self._seen:
            return
        self._seen[id(module)] = module
        name = type(module).__name__
        if isinstance(module, torch.jit.ScriptModule):  # what it holds is not in its __dict__
            self._hold([*module.buffers(), *module.parameters()], name)
            return
        attributes = vars(module)
        for key in ("_buffers", "_parameters"):
            if attributes[key]:
                self._hold(attributes[key], name, bound=named)
        self._hold(attributes, name)

    def _hold(self, entries: Any, name: str, *, bound: bool = True, depth: int = 0) -> None:
        """Remember the tensors among some attributes or items, and those inside of these."""
        if id(entries) in self._seen or len(entries) > LONGEST:
            return
        self._seen[id(entries)] = entries
        tensors: dict[Any, Tensor] = {}
        numbers: dict[Any, float] = {}
        for key, value in list(
            entries.items() if isinstance(entries, dict) else enumerate(entries)
        ):
            kind = type(value)
            if kind in (int, float, bool):
                numbers[key] = value
            elif isinstance(value, Tensor):
                if self._remembers(value, f"{name}.{key}"):
                    tensors[key] = value
            elif kind is torch.Generator:
                self._generators.append((value, value.get_state()))
            elif isinstance(value, dict | list | tuple | deque):
                if value and depth < _DEEPEST:
                    self._hold(value, f"{name}.{key}", depth=depth + 1)
            elif depth == 0 and is_plain_object(value):
                self._hold(attributes(value), f"{name}.{key}", depth=_DEEPEST)
        if bound and not isinstance(entries, tuple) and (tensors or "training" in numbers):
            self._places.append(_Place(entries, tensors, numbers))

    def _remembers(self, tensor: Tensor, name: str) -> bool:
        """Remember a tensor's content, unless it is the optimizer's or has none."""
        if id(tensor) in self._own or tensor.is_meta or is_transformed(tensor):
            return False
        if id(tensor) not in self._contents:
            self._contents[id(tensor)] = _Content(tensor, name)
        return True


@contextmanager
def _collected(errors: list[Exception]) -> Iterator[None]:
    """Go on after an error, and keep it."""
    try:
        yield
    except (TrustRegionError, RuntimeError) as error:
        errors.append(error)


@dataclass(frozen=True)
class _Place:
    """Attributes or items: which tensors and numbers they were."""

    entries: Any
    tensors: dict[Any, Tensor]
    numbers: dict[Any, float]

    def rewind(self, moved: set[int]) -> None:
        """Put the tensors back, and where one was moved or replaced, the numbers."""
        restored = any(id(tensor) in moved for tensor in self.tensors.values())
        for key, tensor in self.tensors.items():
            if self._now(key) is not tensor:
                self._put(key, tensor)
                restored = True
        for key, number in self.numbers.items():
            if restored or key == "training":
                self._put(key, number)

    def _now(self, key: Any) -> Any:
        if isinstance(self.entries, dict):
            return self.entries.get(key)
        return self.entries[key] if key < len(self.entries) else None

    def _put(self, key: Any, value: Any) -> None:
        if isinstance(self.entries, dict) or key < len(self.entries):
            self.entries[key] = value


class _Content:
    """A tensor and what it held.

    Args:
        tensor: It may be written and moved to other memory from now on.
        name: Where it was found.
    """

    def __init__(self, tensor: Tensor, name: str) -> None:
        self.tensor = tensor
        self._name = name
        self._data = local(tensor).data
        self._memory = _every_element_once(self._data)
        large = isinstance(tensor, nn.Parameter) and tensor.numel() > _LARGEST
        self._copy = None if large else self._memory.clone()
        self._version = _version(tensor)

    def rewind(self) -> bool:
        """Put the content back.

        Returns:
            Whether it was moved, as far as this can be told without waiting for the device.

        Raises:
            TrustRegionError: If the tensor is a large frozen parameter, and was written.
        """
        written = _version(self.tensor) != self._version
        self._version = _version(self.tensor)
        if self._copy is None:
            if written:
                raise TrustRegionError(
                    f"The closure writes {self._name}, a frozen parameter of shape "
                    f"{tuple(self.tensor.shape)}. It is too large to be copied and put back. Make "
                    "it a buffer, or write it outside the closure."
                )
            return False
        if not _is_same_memory(local(self.tensor), self._data):  # resized, or given other memory
            self.tensor.data = self._data
        if self._memory.device.type == "cpu" and self._memory.layout == torch.strided:
            if torch.equal(self._memory, self._copy):
                return False  # memory may be read-only
            written = True
        with torch.inference_mode(self._memory.is_inference()):
            self._memory.copy_(self._copy)
        return written


def _every_element_once(tensor: Tensor) -> Tensor:
    """Return a view without the repetitions that ``expand`` makes."""
    if tensor.layout == torch.strided:
        for dim, stride in enumerate(tensor.stride()):
            if stride == 0 and tensor.shape[dim] > 1:
                tensor = tensor.narrow(dim, 0, 1)
    return tensor


def _is_same_memory(left: Tensor, right: Tensor) -> bool:
    if left.layout != torch.strided or right.layout != torch.strided:
        return True
    return (left.data_ptr(), left.shape, left.stride()) == (
        right.data_ptr(),
        right.shape,
        right.stride(),
    )


def _version(tensor: Tensor) -> int:
    return 0 if tensor.is_inference() else tensor._version
