"""What belongs to the policy besides its parameters: the tensors that its modules hold."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from trpo_optim.closure.contents import ArrayContent, TensorContent
from trpo_optim.closure.dtensor import local
from trpo_optim.closure.fsdp import FsdpParameters
from trpo_optim.closure.holders import LONGEST, attributes, is_plain_object, reached
from trpo_optim.closure.places import CONTAINERS, NUMBERS_AND_TEXTS, Place, is_content, remembered
from trpo_optim.closure.random_state import putting_back
from trpo_optim.closure.shared_memory import Spans
from trpo_optim.errors import TrustRegionError
from trpo_optim.torch_private import is_transformed, outside_transforms

__all__ = ["PolicyState"]

_DEEPEST, _DEEPEST_OBJECTS = 3, 2
"""How many lists and dicts inside of each other are looked into, and how many objects."""

_WITH_A_STATE_OF_THEIR_OWN = ("torch.distributed", "torch.nn.parallel", "torch._dynamo")
"""Wrappers, whose attributes are theirs; their modules are the policy's."""


class PolicyState:
    """The tensors of a policy, as they were before the step.

    To the policy belong the modules that hold one of the optimizer's parameters, with their
    submodules, and every other module that runs in an evaluation. A plain object, a dict or a list
    that holds a parameter counts as such a module. The step puts back their buffers, frozen
    parameters and training mode, and the tensors, arrays and random generators among their
    attributes, also in lists, dicts and plain objects there. Numbers go back with a tensor beside
    them that was moved, since a count goes with a running mean.

    Args:
        parameters: The optimizer's own, which the transaction puts back.
        fsdp: The same, if FSDP has sharded them; else None.
    """

    def __init__(self, parameters: Sequence[Tensor], fsdp: FsdpParameters | None = None) -> None:
        self._fsdp = fsdp
        self._own = set(map(id, parameters))
        self._spans = Spans(map(local, parameters))
        self._held: dict[int, _Held] = {}  # by module or object, whose ids it keeps from reuse
        self._active: dict[int, _Held] = {}
        self._contents: dict[int, TensorContent | ArrayContent] = {}

    def hold_reached_from(self, closures: Iterable[Callable[..., Any]]) -> None:
        """Remember the modules and objects that closures lead to, before any evaluation.

        Args:
            closures: What the step is taken on.
        """
        self._reshard()
        for found, holds_parameters in reached(closures, self._own):
            if isinstance(found, nn.Module):
                for module in found.modules():
                    self._hold(module, active=holds_parameters)
            elif holds_parameters:
                self._hold(found, active=True)

    def hold_running(self, module: nn.Module) -> None:
        """Count a module as the policy's that is about to run.

        Args:
            module: If it was not reached, it is remembered only now. ``functional_call`` may have
                put stand-ins in the place of its buffers, so their contents are remembered, and
                not their names.
        """
        if id(module) not in self._active:
            with outside_transforms():
                for each in module.modules():
                    self._hold(each, active=True, named=False)

    def knows(self, module: nn.Module) -> bool:
        """Return whether a module was reached, so that its buffers go back by name.

        Args:
            module: Any.
        """
        held = self._held.get(id(module))
        return held is not None and held.named

    def remembers(self, tensor: Tensor) -> bool:
        """Return whether a tensor's content is put back.

        Args:
            tensor: Any.
        """
        return id(tensor) in self._contents

    def other_leaves(self) -> list[Tensor]:
        """Return the tensors that are not the optimizer's and require gradients."""
        tensors = [each.tensor for each in self._contents.values() if hasattr(each, "tensor")]
        return [each for each in tensors if each.requires_grad and each.is_leaf]

    def held_tensors(self) -> Iterator[Tensor]:
        """Yield the tensors that are now attributes, or lie in containers and objects there."""
        for held in self._active.values():
            for _, _, values in _levels(_entries_of(held.found), ""):
                yield from (each for each in values.values() if isinstance(each, Tensor))

    def rewind(self, *, final: bool) -> None:
        """Put everything back, as far as each can be.

        Args:
            final: Whether no evaluation follows. Then attributes that were None or not there keep
                what the last evaluation gave them.

        Raises:
            TrustRegionError: If a tensor was written that was too large to be copied.
            RuntimeError: If torch refuses to write a tensor.
        """
        self._reshard()
        moved: set[int] = set()
        errors: list[Exception] = []
        keys = dict.fromkeys(key for held in self._active.values() for key in held.contents)
        for key in reversed(keys):  # the first of two aliases wins
            with _collected(errors):
                if self._contents[key].rewind():
                    moved.add(key)
        for held in self._active.values():
            for place in held.places:
                place.rewind(moved, final=final)
            for put_back in held.generators:
                put_back()
        if errors:
            raise errors[0]

    def _reshard(self) -> None:
        if self._fsdp is not None:
            self._fsdp.reshard()

    def _hold(self, found: Any, *, active: bool, named: bool = True) -> None:
        if id(found) not in self._held:
            self._held[id(found)] = _Held(found, self._content_of, named=named)
        if active:
            self._active[id(found)] = self._held[id(found)]

    def _content_of(self, value: Any, name: str, *, buffer: bool) -> int | None:
        """Remember what a tensor or array holds; None where it is the optimizer's or has nothing.

        Returns:
            The key of its content.
        """
        key = id(value)
        if key in self._contents:
            return key
        if not isinstance(value, Tensor):
            self._contents[key] = ArrayContent(value)
        elif key in self._own or is_transformed(value) or is_lazy(value) or self._is_part_of(value):
            return None
        else:
            try:
                self._contents[key] = TensorContent(value, name, buffer=buffer)
            except Exception:  # of a subclass that cannot be copied
                return None
        return key

    def _is_part_of(self, tensor: Tensor) -> bool:
        """Whether a tensor has no memory of its own: on meta, freed by FSDP, or parameters'."""
        if tensor.is_meta or tensor.layout != torch.strided or tensor.is_nested:
            return tensor.is_meta
        held = local(tensor)
        if held.numel() and held.untyped_storage().size() == 0:
            return True
        return self._spans.touch(held)


class _Held:
    """What one module, object, dict or list held.

    Args:
        found: It is kept alive.
        content_of: Remembers a tensor or an array. It is not kept: that would be a circle.
        named: Whether its buffers are bound to their names again.
    """

    def __init__(self, found: Any, content_of: Callable[..., int | None], *, named: bool) -> None:
        self.found = found
        self.named = named
        self.contents: list[int] = []
        self.places: list[Place] = []
        self.generators: list[Callable[[], object]] = []
        name = type(found).__name__
        if isinstance(found, torch.jit.ScriptModule):  # what it holds is not in its __dict__
            self._look_into([*found.buffers(), *found.parameters()], name, content_of)
        elif isinstance(found, nn.Module):
            for key in ("_buffers", "_parameters"):
                if entries := vars(found)[key]:
                    self._look_into(
                        entries, name, content_of, bound=named, buffers=key == "_buffers"
                    )
            if not type(found).__module__.startswith(_WITH_A_STATE_OF_THEIR_OWN):
                beside = list(self.contents), list(self.places)
                self._look_into(vars(found), name, content_of, beside=beside)
        else:
            self._look_into(_entries_of(found), name, content_of)

    def _look_into(
        self,
        entries: Any,
        name: str,
        content_of: Callable[..., int | None],
        *,
        bound: bool = True,
        buffers: bool = False,
        beside: tuple[list[int], list[Place]] = ([], []),
    ) -> None:
        """Remember attributes or items, and what is inside of these.

        With ``beside``, the contents and places of the same object, numbers go back with these.
        """
        for level, place, before in _levels(entries, name):
            contents: list[int] = []
            for key, value in before.items():
                if is_content(value):
                    held = content_of(value, f"{place}.{key}", buffer=buffers)
                    contents += [] if held is None else [held]
                elif put_back := putting_back(value):
                    self.generators.append(put_back)
            self.contents += contents
            if not isinstance(level, tuple) and (bound or level is not entries):
                near, places = beside if level is entries else ([], [])
                self.places.append(Place(level, before, [*contents, *near], places))


def _entries_of(found: Any) -> Any:
    """Return the items of a dict or list, or the attributes of a module or object."""
    return found if isinstance(found, CONTAINERS) else attributes(found)


def _levels(entries: Any, name: str, depth: int = 0) -> Iterator[tuple[Any, str, dict[Any, Any]]]:
    """Yield attributes or items, what they are called and what each is; those inside come first."""
    if len(entries) > LONGEST:
        return
    values = remembered(entries)
    for key, value in values.items():
        if type(value) in NUMBERS_AND_TEXTS or is_content(value):
            continue
        inside = isinstance(value, CONTAINERS) and depth < _DEEPEST
        if inside or (depth < _DEEPEST_OBJECTS and is_plain_object(value)):
            yield from _levels(_entries_of(value), f"{name}.{key}", depth + 1)
    yield entries, name, values


@contextmanager
def _collected(errors: list[Exception]) -> Iterator[None]:
    """Go on after an error, and keep it."""
    try:
        yield
    except (TrustRegionError, RuntimeError) as error:
        errors.append(error)
