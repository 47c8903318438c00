"""A user's closure as a function of the parameters."""

from __future__ import annotations

import math
import reprlib
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, nullcontext

import torch
from torch import Tensor
from torch.distributions import Distribution

from trpo_optim.closure.checks import BACKWARD_CALLED, Numbers, Values, checked_values
from trpo_optim.closure.failures import (
    is_overflow,
    is_refusal,
    needs_graph,
    passed_through_backward,
)
from trpo_optim.closure.interception import RefusedError, Watch
from trpo_optim.closure.lockstep import Lockstep, told
from trpo_optim.closure.parameters import ParameterVector
from trpo_optim.closure.torch_switches import without_cudnn
from trpo_optim.closure.transaction import Transaction
from trpo_optim.errors import TrustRegionError

__all__ = ["Closure", "Objective", "ThirdValue"]

_Part = Distribution | Tensor
_Parts = _Part | Sequence[_Part] | Mapping[str, _Part]

ThirdValue = _Parts | Sequence[_Parts] | Mapping[str, _Parts]
"""The new policy's distribution or a tensor. Policies of Tuple and Dict spaces return a sequence or
mapping of these."""

Closure = Callable[[], tuple[Tensor, Tensor] | tuple[Tensor, Tensor, ThirdValue | None]]
"""A function without arguments that returns ``(loss, kl)`` or ``(loss, kl, dist)``.

``loss`` is a scalar tensor. ``kl`` is a scalar tensor, or one KL per sample, shape (N,). ``dist``
is the new policy's distribution, or the tensors that parametrise it.

Example:
    >>> import torch
    >>> from trpo_optim import Closure
    >>> mean = torch.zeros(2, requires_grad=True)  # of a Gaussian with variance 1
    >>> closure: Closure = lambda: (1 - mean.sum(), mean.square().sum() / 2)
    >>> [value.item() for value in closure()]
    [1.0, 0.0]
"""

_CALLED_BY_A_LOOP = (
    " If a library's training loop calls step() without arguments, register a hook that returns "
    "them: optimizer.register_step_pre_hook(lambda optimizer, args, kwargs: ((optimizer, closure), "
    "{}))."
)


class Objective:
    """A closure that can be evaluated at stand-ins for the parameters, with a graph, or displaced.

    Every evaluation starts from the buffers and the random state that the step began with.

    Args:
        closure: The user's closure.
        vector: The parameters that the closure depends on.
        transaction: What holds the state that an evaluation may move.
        name: Which of a step's closures it is, or empty where there is one.

    Attributes:
        evaluations: How often the closure was called.
        third: Whether it returns a third value; None until that is known.
        drew: Whether the evaluation by torch.func drew random numbers, even if the random state is
            as before.
        dear: What makes second derivatives dear, or empty. Known after an evaluation.
        calls_python: Whether an ``autograd.Function`` lies behind its KL; None until that is known.
        kl_dtype: In which precision the KL was computed, before any cast; None until it is known.
        share: Its weight among the closures of all ranks, if ``backward()`` adds up the gradients
            of all ranks, as FSDP has it; else None.
        lockstep: The ranks that evaluate together with this one, or None.

    Raises:
        TrustRegionError: If there is no closure, or it cannot be called.
    """

    def __init__(
        self,
        closure: Closure | None,
        vector: ParameterVector,
        transaction: Transaction,
        name: str = "",
    ) -> None:
        if not callable(closure):
            raise TrustRegionError(
                f"step() got {reprlib.repr(closure)} as its closure. Pass a function without "
                "arguments that returns (loss, kl) or (loss, kl, dist)."
                + (_CALLED_BY_A_LOOP if closure is None else "")
            )
        self.name = name
        self.vector = vector
        self.evaluations = 0
        self.third: bool | None = None
        self.drew = False
        self.dear = ""
        self.calls_python: bool | None = None
        self.kl_dtype: torch.dtype | None = None
        self.share: float | None = None
        self.lockstep: Lockstep | None = None
        self.closure = closure
        self._transaction = transaction
        # Until seen; then every evaluation runs what draws the same dropout masks.
        self._recurrent = self._random = self._differentiates = False
        self._interfered = False
        self._keeps_graphs: bool | None = None  # until it is looked for
        self._precision = 0.0

    def at(self, *twins: Tensor) -> Values:
        """Evaluate with each parameter replaced by its twin, wherever it is used.

        Made to be called inside torch.func's transforms, which is why it does not rewind: nothing
        outside may be written there.

        Args:
            twins: One tensor per parameter, in order and of the same shape.

        Returns:
            The loss and the KL as functions of the twins.

        Raises:
            RefusedError: If a call of torch raised. A plain evaluation shows whether the transforms
                are the reason.
            TrustRegionError: If the closure is misused.
            OutOfMemoryError: If there is no memory left.
            Exception: Whatever else the closure raises by itself.
        """
        identities = map(id, self.vector.parameters)
        watch = self._watch(dict(zip(identities, twins, strict=True)))
        try:
            values = self._watched(watch)
            self.drew = watch.drew
            if watch.failure is not None:  # the closure has gone another way
                raise RefusedError(str(watch.failure))
            return values
        except (RefusedError, TrustRegionError, torch.OutOfMemoryError):
            raise
        except Exception as error:
            if is_refusal(error, watch.failure):
                raise RefusedError(str(error)) from error
            raise
        finally:
            watch.failure = None  # its traceback leads back here

    def with_graph(self, check: Callable[[Values], object] | None = None) -> Values:
        """Evaluate at the parameters themselves, recording the graph and checking what is used.

        Args:
            check: Raises if the values do not serve. All ranks that evaluate together learn of it.

        Returns:
            The values.
        """
        with told(self.lockstep):
            return _passed(self._with_graph(), check)

    def with_graph_elsewhere(self, check: Callable[[Values], object]) -> Values | None:
        """Evaluate with a graph, after an evaluation that checked.

        Args:
            check: As for ``with_graph``.

        Returns:
            The values; None at an overflow.
        """
        if self._keeps_graphs is None:  # of the last evaluation, outside of the policy
            self.rewind()
            self._keeps_graphs = self._transaction.kept.any_with_graph(self.vector.leaves)
        watched = self._interfered or self._keeps_graphs
        try:
            with told(self.lockstep, overflow=True):
                values = self._with_graph() if watched else self._plain(graph=True)
                return _passed(values, check)
        except Exception as error:
            if not is_overflow(error):
                raise
            return None

    @property
    def precision(self) -> float:
        """The unit of rounding of the coarsest parameter and of what the closure computes."""
        return max(self.vector.precision, self._precision)

    def kernels(self) -> AbstractContextManager[None]:
        """Have what a backward computes anew be computed as the evaluation computed it."""
        return without_cudnn() if self._recurrent else nullcontext()

    def rewind(self) -> None:
        """Return buffers and random state to where the step found them."""
        self._transaction.rewind()

    def other_leaves(self) -> list[Tensor]:
        """Return the policy's tensors that are not the optimizer's and require gradients."""
        return self._transaction.policy.other_leaves()

    def drew_random_numbers(self) -> bool:
        """Return whether the evaluation since the last rewind drew random numbers."""
        return self._transaction.drew_random_numbers()

    def values(self) -> Numbers:
        """Return the loss and the KL where the parameters now are, without a graph.

        Gradients are off, unless the closure takes one itself.

        A ``torch.distributions`` object that refuses its arguments there counts as NaN, and so does
        a factorisation that fails: that is what an overflow looks like to them.

        Returns:
            The numbers.

        Raises:
            ValueError: Whatever else the closure raises.
        """
        try:
            with told(self.lockstep, overflow=True):
                return self._plain(graph=False).numbers()
        except Exception as error:
            if not is_overflow(error):
                raise
            return Numbers(math.nan, math.nan)

    def everywhere(self, flag: bool) -> bool:
        """Return whether a flag is true on all ranks that evaluate together."""
        return flag if self.lockstep is None else self.lockstep.everywhere(flag)

    def _with_graph(self) -> Values:
        self.rewind()
        with torch.enable_grad():
            values = self._watched(self._watch({}))
        self._random |= self.drew_random_numbers()
        return values

    def _plain(self, *, graph: bool) -> Values:
        """Evaluate unwatched, so that compiled modules run compiled."""
        contexts: list[AbstractContextManager[object]] = []
        if self._recurrent:
            contexts.append(without_cudnn())
        if self._differentiates:
            contexts.append(torch.enable_grad())
        self._transaction.run_compiled(not self._random)
        self.rewind()
        self._transaction.unwatched = graph
        try:
            with torch.set_grad_enabled(graph):
                return self._evaluate(*contexts)
        except RuntimeError as error:
            if graph or self._differentiates or not needs_graph(error):
                raise
            self._differentiates = True
            return self._plain(graph=graph)

    def _watch(self, twins: dict[int, Tensor]) -> Watch:
        own = () if self.vector.fsdp else self.vector.parameters  # FSDP itself takes their memory
        return Watch(self._transaction, own, twins, self.vector.fsdp)

    def _watched(self, watch: Watch) -> Values:
        try:
            self._transaction.run_compiled(False)
            told = self._transaction.modules_about_to_run(watch.before_forward)
            return self._evaluate(told, watch)
        finally:
            watch.remove()
            self._recurrent |= watch.recurrent
            self._differentiates |= watch.differentiates
            self._interfered |= watch.interfered
            self.dear = self.dear or watch.dear
            self._precision = max(self._precision, watch.precision)

    def _evaluate(self, *contexts: AbstractContextManager[object]) -> Values:
        self.evaluations += 1
        for parameter in self.vector.parameters:
            if parameter.grad is not None:  # a backward of the last evaluation's made it
                parameter.grad = None
        try:
            with ExitStack() as stack:
                for context in (self._transaction.evaluation(), *contexts):
                    stack.enter_context(context)
                returned = self.closure()
            values = checked_values(returned)
        except RuntimeError as error:
            if passed_through_backward(error):
                raise TrustRegionError(BACKWARD_CALLED) from error
            raise
        if any(parameter.grad is not None for parameter in self.vector.parameters):
            raise TrustRegionError(BACKWARD_CALLED)
        return values


def _passed(values: Values, check: Callable[[Values], object] | None) -> Values:
    if check is not None:
        check(values)
    return values
