"""All or nothing: what a step may move, and how it is put back."""

from __future__ import annotations

import threading
from collections.abc import Iterator, MutableMapping
from types import TracebackType
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_buffer_registration_hook
from torch.utils.hooks import RemovableHandle
from torch.utils.weak import WeakIdKeyDictionary

from trpo_optim.closure.dtensor import local
from trpo_optim.closure.kept_tensors import KeptTensors
from trpo_optim.closure.parameters import ParameterVector
from trpo_optim.closure.random_state import generators
from trpo_optim.torch_private import is_transformed, outside_transforms

__all__ = ["Transaction"]

_Place = tuple[()] | tuple[int, torch.Size, tuple[int, ...]]
"""Of a tensor in its storage: offset, shape and strides."""


class Transaction:
    """Holds the state of one step; whatever is not committed is rolled back.

    Held are the parameters, their ``.grad`` (hidden meanwhile, so that nothing can add to it), the
    random generators of the CPU and of the parameters' device, and every module buffer that an
    evaluation of the closure writes or replaces. Buffers and random state return to where they were
    before every further evaluation and at the end of every step, so that all evaluations of a step
    see the same dropout mask and the same statistics.

    The step itself ends the transaction, one way or the other; leaving ``with`` rolls back what an
    exception or an interrupt kept from ending.

    Args:
        vector: The parameters that the step may move.

    Attributes:
        origin: The parameters before the step, shape (n,).
        kept: Tensors of the evaluations, made plain when the step ends.
    """

    def __init__(self, vector: ParameterVector) -> None:
        self._vector = vector
        self.origin = vector.current()
        self._grads = [parameter.grad for parameter in vector.parameters]
        self._random = [(each, each.get_state()) for each in generators([vector.device])]
        self._written: MutableMapping[Any, dict[_Place, Tensor]] = WeakIdKeyDictionary()
        self.kept = KeptTensors()
        self._moved = [False] * len(vector.parameters)
        self._replaced: dict[tuple[int, str], tuple[nn.Module, str, Tensor | None]] = {}
        self._thread = threading.get_ident()
        self._ended = False
        self._hook: RemovableHandle | None = None

    def __enter__(self) -> Transaction:
        """Return the transaction itself."""
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Roll back unless the transaction has ended."""
        if not self._ended:
            self.roll_back()

    def begin(self) -> None:
        """Take ``.grad`` off the parameters and watch the buffers until the step ends."""
        self._hook = register_module_buffer_registration_hook(self._remember_replaced)
        for parameter in self._vector.parameters:
            parameter.grad = None

    def remember_written(self, tensor: Tensor) -> None:
        """Keep the content of a tensor about to be written in place, for as long as it lives."""
        if tensor.grad_fn is not None or is_transformed(tensor):
            return
        tensor = local(tensor)
        owner: Any = tensor
        place: _Place = ()
        if tensor.layout == torch.strided:  # the memory outlives this view of it
            owner = tensor.untyped_storage()
            place = (int(tensor.storage_offset()), tensor.shape, tensor.stride())
        contents = self._written.setdefault(owner, {})
        if place not in contents:
            with outside_transforms():  # a copy made at a transform's level dies with it
                contents[place] = tensor.detach().clone()

    def rewind(self) -> None:
        """Return buffers and random state to where they were before the step."""
        for module, name, value in self._replaced.values():
            module._buffers[name] = value
        for owner, contents in self._written.items():
            for place, content in reversed(contents.items()):  # the first of two aliases wins
                target = content.new_empty(0).set_(owner, *place) if place else owner.detach()
                target.copy_(content)
        for generator, state in self._random:
            generator.set_state(state)
        self.kept.unwrap()
        torch.clear_autocast_cache()  # it does not see parameters that are written in place

    def random_states(self) -> list[Tensor]:
        """Return the state of every generator that an evaluation may draw from."""
        return [generator.get_state() for generator, _ in self._random]

    def drew_random_numbers(self) -> bool:
        """Return whether a generator has moved since the last rewind."""
        return any(not torch.equal(each.get_state(), state) for each, state in self._random)

    def move(self, step: Tensor, scale: float) -> None:
        """Put the parameters at origin + scale · step; whether they may stay is decided later.

        Args:
            step: Shape (n,).
            scale: The share of it to take.
        """
        reached = self._vector.reached(step)
        self._moved = [a or b for a, b in zip(self._moved, reached, strict=True)]
        self._put(torch.add(self.origin, step, alpha=scale))

    def moved(self) -> float:
        """Return how far the parameters are from the origin, as their precision has it."""
        return float((self._vector.current() - self.origin).norm())

    def elsewhere(self) -> Iterator[Tensor]:
        """Yield moves to points where every parameter has one length and lies along no axis."""
        for length in (1.0, 1e3, 1e6):
            yield length * self._waves() - self.origin

    def far_away(self) -> Tensor:
        """Return a move of a tenth of each parameter's length, fixed and along no axis."""
        pieces = (self._vector.scatter(each) for each in (self.origin, self._waves()))
        return self._vector.gather(
            [0.1 * max(1.0, float(here.norm())) * wave for here, wave in zip(*pieces, strict=True)]
        )

    def _waves(self) -> Tensor:
        """Return a fixed vector along no axis, in every parameter of length 1."""
        waves = torch.arange(1.0, len(self.origin) + 1, device=self._vector.device).sin()
        return self._vector.gather([each / each.norm() for each in self._vector.scatter(waves)])

    def roll_back(self) -> None:
        """Put back everything, the parameters too."""
        self._put(self.origin)
        self._settle()

    def commit(self) -> None:
        """Keep the parameters as they are now; put back everything else."""
        self._settle()

    def _put(self, vector: Tensor) -> None:
        """Have the parameters that any move reached take their values from a vector."""
        self._vector.write(self._vector.scatter(vector), self._moved)

    def _settle(self) -> None:
        try:
            self.rewind()
            self.kept.make_plain(self._vector.parameters)
        finally:
            for parameter, grad in zip(self._vector.parameters, self._grads, strict=True):
                parameter.grad = grad
            if self._hook is not None:
                self._hook.remove()
        self._ended = True

    def _remember_replaced(self, module: nn.Module, name: str, value: Tensor | None) -> None:
        """Keep the tensor that a module's buffer is about to lose; torch calls this."""
        key = (id(module), name)
        ours = threading.get_ident() == self._thread and name in module._buffers
        if ours and key not in self._replaced and module._buffers[name] is not value:
            self._replaced[key] = (module, name, module._buffers[name])
