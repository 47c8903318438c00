"""check_policy: every check of a policy, in the order in which faults are best read."""

from __future__ import annotations

import textwrap
from collections.abc import Callable, Collection, Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.optimizer import ParamsT

from trpo_optim.distributions.parts import leaves
from trpo_optim.errors import TrustRegionError
from trpo_optim.optimizer import TrustRegionOptimizer
from trpo_optim.testing.argument_checks import check_arguments
from trpo_optim.testing.attributes import Attributes
from trpo_optim.testing.behaviour_checks import (
    check_determinism,
    check_parameters,
    check_rows,
)
from trpo_optim.testing.derivative_checks import (
    check_fisher,
    check_score,
    check_second_order,
    check_zero_kl,
)
from trpo_optim.testing.distribution_checks import (
    check_density,
    check_entropy,
    check_kl,
    check_sampler,
    check_shapes,
)
from trpo_optim.testing.evaluated import module_of
from trpo_optim.testing.findings import (
    Finding,
    PolicyReport,
    each_of,
    failed,
    undecided,
    without,
)
from trpo_optim.testing.finite_check import check_finite
from trpo_optim.testing.precision import in_double_precision
from trpo_optim.testing.state_check import check_state
from trpo_optim.testing.step_checks import check_step
from trpo_optim.testing.subject import Subject

__all__ = ["POLICY_CHECKS", "assert_policy", "check_policy"]

_Check = Callable[[Subject], Finding]

_UNBOUNDED = (
    "Nothing keeps the network's outputs within these bounds: apply exp() or softplus() to them, "
    "or pass logits, not probabilities."
)


def _in_double_precision(check: _Check) -> _Check:
    return lambda subject: check(in_double_precision(subject))


POLICY_CHECKS: dict[str, _Check] = {
    "state": check_state,
    "one action per row": check_shapes,
    "deterministic": check_determinism,
    "rows": check_rows,
    "parameters": check_parameters,
    "arguments": check_arguments,
    "finite": check_finite,
    "density": check_density,
    "sampler": check_sampler,
    "entropy": check_entropy,
    "score": _in_double_precision(check_score),
    "zero kl": _in_double_precision(check_zero_kl),
    "kl": _in_double_precision(check_kl),
    "second order": check_second_order,
    "fisher": _in_double_precision(check_fisher),
    "step": _in_double_precision(check_step),
}
"""The checks of ``check_policy`` by name, in the order of causes.

Example:
    >>> from trpo_optim.testing import POLICY_CHECKS
    >>> list(POLICY_CHECKS)[:3]
    ['state', 'one action per row', 'deterministic']
"""


def check_policy(
    policy: Callable[[Any], Any],
    observations: Any,
    *,
    actions: Any = None,
    kl: Callable[[Any, Any], Tensor] | None = None,
    parameters: ParamsT | None = None,
    skip: Collection[str] = (),
    draws: int = 256,
    seed: int = 0,
) -> PolicyReport:
    """Find out whether a policy is sound, and if not, why.

    The call leaves parameters, buffers, plain attributes, gradients and torch's random state as
    they were.

    Args:
        policy: A module, a method of a module (``agent.dist``), or a function. It maps observations
            to a ``torch.distributions.Distribution``, or to a tuple or dict of distributions.
        observations: A tensor, or a tuple or dict of tensors, batch first. Real observations are
            best. An object that holds tensors, such as a batch of graphs, is checked as a whole.
        actions: Actions at the observations, in the form that ``log_prob`` takes. None: sampled.
        kl: A function from the old and the new distribution to their mean KL, in nats. None:
            ``mean_kl``, or ``sampled_kl`` on drawn actions if there is no closed form.
        parameters: The trained parameters, in any form that the optimizer takes. Needed if
            ``policy`` is neither a module nor a method of one.
        skip: Names of checks to leave out.
        draws: Actions per observation in averages. Noise alone fails a comparison of averages once
            in ten million times.
        seed: The seed of the draws.

    Returns:
        One finding per check.

    Raises:
        TrustRegionError: If there are no parameters to check, or ``skip`` names no check.

    Example:
        >>> import torch
        >>> from torch.distributions import Categorical
        >>> from trpo_optim.testing import check_policy
        >>> network = torch.nn.Linear(4, 2)
        >>> report = check_policy(
        ...     lambda observations: Categorical(logits=network(observations)),
        ...     torch.randn(64, 4, generator=torch.Generator().manual_seed(0)),
        ...     parameters=network.parameters(),
        ... )
        >>> report.passed
        True
    """
    checks = without(POLICY_CHECKS, skip)
    module = module_of(policy)
    if parameters is None and module is None:
        raise TrustRegionError(
            f"{policy!r} is not a module, so its parameters are not known. Pass them: "
            "check_policy(policy, observations, parameters=[...])."
        )
    if draws < 16:
        raise TrustRegionError(
            f"draws is {draws!r}; it must be at least 16, for averages over a row."
        )
    trained = (
        _tensors(parameters)
        if parameters is not None or module is None
        else list(module.parameters())
    )
    with (
        torch.inference_mode(False),
        torch.enable_grad(),
        torch.random.fork_rng(),
        _restored(module, trained),
    ):
        torch.manual_seed(seed)
        subject = Subject(policy, observations, trained, kl, actions, draws)
        with _restored(module, trained):  # what it moves is for the checks to find
            cause, remedy = _why_not(subject)
        if cause and checks:
            return _nothing_to_check(checks, cause, remedy)
        runs = {name: partial(check, subject) for name, check in checks.items()}
        return PolicyReport(tuple(each_of(runs, _told)))


def assert_policy(policy: Callable[[Any], Any], observations: Any, **options: Any) -> None:
    """Raise an error if ``check_policy`` finds a fault.

    Args:
        policy: As for ``check_policy``.
        observations: As for ``check_policy``.
        options: As for ``check_policy``.

    Raises:
        AssertionError: If a check fails. The text has all findings.

    Example:
        >>> import torch
        >>> from torch.distributions import Categorical
        >>> from trpo_optim.testing import assert_policy
        >>> logits = torch.zeros(2, requires_grad=True)
        >>> try:  # probabilities in place of logits
        ...     assert_policy(
        ...         lambda seen: Categorical(logits=logits.softmax(-1).expand(len(seen), -1)),
        ...         torch.zeros(16, 1),
        ...         parameters=[logits],
        ...     )
        ... except AssertionError as error:
        ...     print("given probabilities as logits" in str(error))
        True
    """
    check_policy(policy, observations, **options).require()


def _tensors(parameters: ParamsT | None) -> list[Tensor]:
    groups = TrustRegionOptimizer(() if parameters is None else parameters).param_groups
    return [each for group in groups for each in group["params"]]


def _why_not(subject: Subject) -> tuple[str, str]:
    """Return why the policy cannot be evaluated to distributions, and the remedy, or nothing."""
    try:
        returned = subject.raw(subject.observations)
        leaves(returned)
    except Exception as error:  # whatever a policy may raise
        unbounded = "to satisfy the constraint" in str(error)
        return _told(error), _UNBOUNDED if unbounded else ""
    try:
        _ = subject.rows, subject.old  # making a frozen copy looks at the arguments
    except TrustRegionError as error:
        return str(error), ""
    except Exception:  # what else may go wrong is for the checks to find
        return "", ""
    return "", ""


def _nothing_to_check(checks: Iterable[str], cause: str, remedy: str) -> PolicyReport:
    """Return one finding of what is wrong, and nothing on all that would follow from it."""
    first, *rest = checks
    return PolicyReport(
        (
            failed(first, {}, cause, remedy),
            *(undecided(name, "There is no policy to check.") for name in rest),
        )
    )


def _told(error: Exception) -> str:
    return textwrap.shorten(f"{type(error).__name__}: {error}", 400)


@contextmanager
def _restored(module: nn.Module | None, parameters: Iterable[Tensor]) -> Iterator[None]:
    """Put parameters, buffers, plain attributes and training modes back at the end."""
    modules = [] if module is None else list(module.modules())
    attributes = Attributes(module)
    training = [each.training for each in modules]
    tensors = list(parameters)
    for each in modules:
        tensors += [*each.parameters(recurse=False), *each.buffers(recurse=False)]
    contents = [each.detach().clone() for each in tensors]
    try:
        yield
    finally:
        with torch.no_grad():
            for tensor, content in zip(tensors, contents, strict=True):
                tensor.copy_(content)
        for each, mode in zip(modules, training, strict=True):
            each.training = mode
        attributes.restore()
