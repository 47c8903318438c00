"""All or nothing: what a step may move, and how it is put back."""

from __future__ import annotations

import threading
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.module import (
    register_module_buffer_registration_hook,
    register_module_forward_pre_hook,
)
from torch.utils.hooks import RemovableHandle

from trpo_optim.closure.contents import same_bits
from trpo_optim.closure.dtensor import local
from trpo_optim.closure.kept_tensors import KeptTensors
from trpo_optim.closure.parameters import ParameterVector
from trpo_optim.closure.policy_state import PolicyState
from trpo_optim.closure.random_state import generators
from trpo_optim.closure.torch_switches import differentiable, uncompiled
from trpo_optim.long_vectors import norm
from trpo_optim.torch_private import autocast_put_back, copy_each

__all__ = ["HIDDEN", "Transaction"]

HIDDEN = ("grad", "_backward_hooks", "_post_accumulate_grad_hooks")
"""What a derivative must neither add to nor call, by attribute of a parameter."""

_Replaced = tuple[nn.Module, str, Tensor | None, Tensor | None]
"""Of a buffer that was bound anew: its module, its name, what it was, and what it became."""

_HOOKS_NOT_CALLED = (
    "Some parameters have hooks on their gradients. A step does not call them, since they change "
    "neither the loss nor the KL. To keep a part of a parameter fixed, multiply it by a mask "
    "inside the closure."
)


class Transaction:
    """Holds the state of one step; whatever is not committed is rolled back.

    Held are the parameters, their ``.grad`` and their hooks (hidden meanwhile), the random
    generators of the CPU and of the parameters' device, and what else belongs to the policy
    (``PolicyState``). The policy's state and the random state return to where they were before
    every further evaluation and at the end of every step, so that all evaluations of a step see the
    same dropout mask and the same statistics. A generator that no evaluation has moved is not
    touched. Leaving ``with`` rolls back what an exception or an interrupt kept a step from ending.

    Args:
        vector: The parameters that the step may move.

    Attributes:
        origin: The parameters before the step, shape (n,).
        policy: What is put back besides the parameters and randomness.
        kept: Tensors of the evaluations, made plain when the step ends.
        unwatched: Whether the last evaluation made tensors with a graph that are not in ``kept``.
    """

    def __init__(self, vector: ParameterVector) -> None:
        self._vector = vector
        self.origin = vector.current()
        self._hidden = [
            (each, name, getattr(each, name)) for each in vector.parameters for name in HIDDEN
        ]
        self._generators = generators([vector.device])
        self._random = self.random_states()
        self._drawn = [False] * len(self._generators)
        self.policy = PolicyState(vector.parameters, vector.fsdp)
        self.kept = KeptTensors()
        self._moved = [False] * len(vector.parameters)
        self._replaced: dict[tuple[int, str], _Replaced] = {}
        self._thread = threading.get_ident()
        self._ended = self._uncompiled = self.unwatched = self._drew = False
        self._put_autocast_back = autocast_put_back(vector.device)
        self._hooks: list[RemovableHandle] = []
        self._memory: tuple[list[Tensor], list[Tensor]] | None = None

    def __enter__(self) -> Transaction:
        """Return the transaction itself."""
        return self

    def __exit__(self, *error: object) -> None:
        """Roll back unless the transaction has ended; write what an interrupt kept from it."""
        if not self._ended:
            self.roll_back()
        self._write_memory()

    def hold(self, closures: Iterable[Callable[..., Any]]) -> None:
        """Remember the policy's state; nothing is changed.

        Args:
            closures: What the step is taken on.
        """
        self.policy.hold_reached_from(closures)
        if any(name != "grad" and value for _, name, value in self._hidden):
            warnings.warn(_HOOKS_NOT_CALLED, stacklevel=2)

    def begin(self) -> None:
        """Hide ``.grad`` and hooks, set torch's switches, and watch what modules run."""
        differentiable.hold(self)
        self._hooks.append(register_module_buffer_registration_hook(self._remember_replaced))
        for parameter, name, value in self._hidden:
            if value is not None:
                setattr(parameter, name, None)

    @contextmanager
    def modules_about_to_run(self, told: Callable[[nn.Module], None]) -> Iterator[None]:
        """Have this thread's modules told of before they run.

        Args:
            told: Takes the module.

        Yields:
            Nothing.
        """

        def tell(module: nn.Module, _inputs: Any) -> None:
            if threading.get_ident() == self._thread:
                told(module)

        before = len(self._hooks)
        try:
            self._hooks.append(register_module_forward_pre_hook(tell))  # on one line: none is lost
            yield
        finally:
            self._remove_hooks(keep=before)

    def run_compiled(self, compiled: bool) -> None:
        """Have compiled modules run compiled, or as they were written, until told otherwise.

        Args:
            compiled: Whether they are to run compiled.
        """
        if compiled:
            uncompiled.release(self)
        elif not self._uncompiled:
            uncompiled.hold(self)
        self._uncompiled = not compiled

    @contextmanager
    def evaluation(self) -> Iterator[None]:
        """Note which generators an evaluation moves.

        Yields:
            Nothing.
        """
        before, known = self.random_states(), self._drawn
        self._drawn = [True] * len(known)  # should this be interrupted
        try:
            yield
        finally:
            after = self.random_states()
            drawn = [not torch.equal(*states) for states in zip(before, after, strict=True)]
            self._drew = any(drawn)
            self._drawn = [a or b for a, b in zip(known, drawn, strict=True)]

    def rewind(self, *, final: bool = False) -> None:
        """Return the policy's state and the random state to where they were before the step.

        Args:
            final: Whether no evaluation follows.
        """
        for module, name, before, now in self._replaced.values():
            if module._buffers.get(name) is now:  # not a stand-in that has gone
                module._buffers[name] = before
        try:
            self.policy.rewind(final=final)
        finally:
            states = zip(self._generators, self._random, self._drawn, strict=True)
            for generator, state, drawn in states:
                if drawn:
                    generator.set_state(state)
            self.kept.unwrap()
            torch.clear_autocast_cache()  # it does not see parameters that are written in place

    def random_states(self) -> list[Tensor]:
        """Return the state of every generator that an evaluation may draw from."""
        return [generator.get_state() for generator in self._generators]

    def drew_random_numbers(self) -> bool:
        """Return whether the last evaluation moved a generator."""
        return self._drew

    def move(self, step: Tensor, scale: float) -> None:
        """Put the parameters at origin + scale · step; whether they may stay is decided later.

        Args:
            step: Shape (n,).
            scale: The share of it to take.
        """
        if not all(self._moved):
            reached = self._vector.reached(step)
            self._moved = [a or b for a, b in zip(self._moved, reached, strict=True)]
        self._put(torch.add(self.origin, step, alpha=scale))

    @property
    def rounding(self) -> float:
        """The length of what rounding adds to a move: a third of the last place of each element."""
        return 0.3 * self._vector.precision * float(norm(self.origin))

    def change(self) -> Tensor:
        """Return what the parameters moved by, (n,), as their precision has it."""
        return self._vector.current().sub_(self.origin)

    def blocks(self, vector: Tensor) -> list[Tensor]:
        """Return the pieces of a vector, one for each parameter."""
        return self._vector.split(vector)

    def name(self, index: int) -> str:
        """Return what a parameter is called, for messages."""
        return f"{self._vector.names[index]}{self._vector.counting}"

    def elsewhere(self) -> Iterator[Tensor]:
        """Yield moves to points where every parameter has one length and lies along no axis."""
        for length in (1.0, 1e3, 1e6):
            yield length * self._vector.waves() - self.origin

    def far_away(self) -> Tensor:
        """Return a move of a tenth of each parameter's length, fixed and along no axis."""
        pieces = (self._vector.scatter(each) for each in (self.origin, self._vector.waves()))
        return self._vector.gather(
            [0.1 * max(1.0, float(here.norm())) * wave for here, wave in zip(*pieces, strict=True)]
        )

    def roll_back(self) -> None:
        """Put back everything, the parameters too."""
        self._memory = None
        try:
            self._put(self.origin)
        except RuntimeError:  # torch does not write a parameter
            self._settle()
            raise
        self._settle()

    def commit(self, targets: Sequence[Tensor] = (), sources: Sequence[Tensor] = ()) -> None:
        """Keep the parameters, and write sources into targets in one call; put back all else.

        An interrupt before all else has been put back undoes the step. After a later one, leaving
        ``with`` writes what is not written yet.
        """
        self._memory = (list(targets), list(sources)) if targets else None
        self._settle()
        self._write_memory()

    def _write_memory(self) -> None:
        if self._memory is not None:
            copy_each(*self._memory)  # which may be done twice
        self._memory = None

    def _put(self, vector: Tensor) -> None:
        """Have the parameters that any move reached take their values from a vector."""
        self._vector.write(self._vector.scatter(vector), self._moved)

    def _settle(self) -> None:
        try:
            self._put_back_unmoved()
            self.rewind(final=True)
        finally:
            try:
                if self.unwatched:
                    for tensor in self.policy.held_tensors():
                        self.kept.add(tensor)
                self.kept.make_plain(self._vector.leaves)
            finally:
                for parameter, name, value in self._hidden:
                    if getattr(parameter, name) is not value:
                        setattr(parameter, name, value)
                self._remove_hooks()
                uncompiled.release(self)
                differentiable.release(self)
                self._put_autocast_back()
        self._ended = True

    def _remove_hooks(self, keep: int = 0) -> None:
        for hook in self._hooks[keep:]:
            hook.remove()
        del self._hooks[keep:]

    def _put_back_unmoved(self) -> None:
        """Undo what an evaluation wrote into parameters that the step does not move."""
        if all(self._moved):
            return
        origin = self._vector.scatter(self.origin)
        each = zip(self._vector.parameters, origin, self._moved, strict=True)
        written = [not (moved or same_bits(local(now), local(old))) for now, old, moved in each]
        self._vector.write(origin, written)

    def _remember_replaced(self, module: nn.Module, name: str, value: Tensor | None) -> None:
        """Keep the tensor that a module's buffer is about to lose; torch calls this."""
        if threading.get_ident() != self._thread or self.policy.knows(module):
            return
        key = (id(module), name)
        if name in module._buffers and module._buffers[name] is not value:
            *_, before, _ = self._replaced.get(key, (module._buffers[name], None))
            self._replaced[key] = (module, name, before, value)
