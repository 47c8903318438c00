"""A user's closure as a function of the parameters."""

from __future__ import annotations

import math
import reprlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, nullcontext
from pathlib import Path
from types import CodeType

import torch
import torch.distributions
from torch import Tensor
from torch.distributions import Distribution

from trpo_optim.closure.checks import BACKWARD_CALLED, Numbers, Values, checked_values
from trpo_optim.closure.interception import RefusedError, Watch
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


_NO_GRAPH = "does not require grad"
"""Words in torch's error when a closure differentiates inside itself while gradients are off."""


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
            )
        self.name = name
        self.vector = vector
        self.evaluations = 0
        self.third: bool | None = None
        self.drew = False
        self.closure = closure
        self._transaction = transaction
        # Until seen; then every evaluation runs what draws the same dropout masks.
        self._recurrent = self._random = self._differentiates = False
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
            if _is_refusal(error, watch.failure):
                raise RefusedError(str(error)) from error
            raise
        finally:
            watch.failure = None  # its traceback leads back here

    def with_graph_elsewhere(self) -> Values | None:
        """Evaluate at displaced parameters, recording the graph; None at an overflow there."""
        try:
            return self.with_graph()
        except Exception as error:
            if not _is_overflow(error):
                raise
            return None

    def with_graph(self) -> Values:
        """Evaluate at the parameters themselves, recording the graph."""
        self.rewind()
        with torch.enable_grad():
            values = self._watched(self._watch({}))
        self._random |= self.drew_random_numbers()
        return values

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
        return self._transaction.other_leaves()

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
            return self._without_graph()
        except Exception as error:
            if not _is_overflow(error):
                raise
            return Numbers(math.nan, math.nan)

    def _without_graph(self) -> Numbers:
        contexts: list[AbstractContextManager[object]] = []
        if self._recurrent:
            contexts.append(without_cudnn())
        if self._differentiates:
            contexts.append(torch.enable_grad())
        self._transaction.run_compiled(not self._random)
        self.rewind()
        try:
            values = self._evaluate(*contexts)
        except RuntimeError as error:
            if self._differentiates or _NO_GRAPH not in str(error):
                raise
            self._differentiates = True
            return self._without_graph()
        return values.numbers()

    def _watch(self, twins: dict[int, Tensor]) -> Watch:
        return Watch(self._transaction, self.vector.parameters, twins)

    def _watched(self, watch: Watch) -> Values:
        try:
            self._transaction.run_compiled(False)
            told = self._transaction.modules_about_to_run(watch.before_forward)
            return self._evaluate(told, watch)
        finally:
            watch.remove()
            self._recurrent |= watch.recurrent
            self._differentiates |= watch.differentiates
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
            if _passed_through_backward(error):
                raise TrustRegionError(BACKWARD_CALLED) from error
            raise
        if any(parameter.grad is not None for parameter in self.vector.parameters):
            raise TrustRegionError(BACKWARD_CALLED)
        return values


def _is_refusal(error: BaseException, failure: BaseException | None) -> bool:
    """Whether an exception is, or follows from, a refusal by torch.

    Args:
        error: What came out of the closure.
        failure: What a call of torch has raised in this evaluation, or None.

    Returns:
        Whether it is.
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


def _is_overflow(error: Exception) -> bool:
    """Whether an exception is what an overflow looks like to torch's distributions and solvers."""
    if isinstance(error, torch.linalg.LinAlgError):  # type: ignore[attr-defined]  # documented, not in __all__
        return True
    return isinstance(error, ValueError) and _raised_in(error, torch.distributions.__file__)


def _passed_through_backward(error: BaseException) -> bool:
    """Whether an exception came out of a call of backward()."""
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
