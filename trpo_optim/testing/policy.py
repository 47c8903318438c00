"""check_policy: every check of a policy, in the order in which faults are best read."""

from __future__ import annotations

import textwrap
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager
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
from trpo_optim.testing.findings import Finding, PolicyReport, Verdict, without
from trpo_optim.testing.finite_check import check_finite
from trpo_optim.testing.precision import in_double_precision
from trpo_optim.testing.state_check import check_state
from trpo_optim.testing.step_checks import check_step
from trpo_optim.testing.subject import Subject

__all__ = ["POLICY_CHECKS", "assert_policy", "check_policy"]

_Check = Callable[[Subject], Finding]

_UNBOUNDED = (
    "Nothing keeps what the network gives within these bounds: take exp() or softplus() of it, or "
    "pass logits, not probabilities."
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
"""By name, in the order in which a fault is best read: what comes first explains what follows."""


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

    Parameters, buffers, plain attributes, gradients and the random state are afterwards what they
    were.

    Args:
        policy: From observations to a ``torch.distributions.Distribution``, or a tuple or dict of
            them: a module, a method of one (``agent.dist``), or any function.
        observations: A tensor, or a tuple or dict of them, the batch first; best real ones. An
            object that holds tensors, such as a batch of graphs, is checked as a whole.
        actions: Taken at the observations, as ``log_prob`` has them; None: sampled.
        kl: From the old and the new distribution to their mean KL, in nats. None: ``mean_kl``, or
            where that has no closed form ``sampled_kl`` on drawn actions.
        parameters: What is trained, in any form that the optimizer takes; needed where ``policy``
            is neither a module nor its method.
        skip: Names of checks that are left out.
        draws: Actions per observation in averages. These may differ by what normal noise explains
            but once in ten million times.
        seed: Of the draws.

    Returns:
        One finding per check.

    Raises:
        TrustRegionError: If there are no parameters to check, or ``skip`` names no check.
    """
    checks = without(POLICY_CHECKS, skip)
    module = module_of(policy)
    if parameters is None and module is None:
        raise TrustRegionError(
            f"{policy!r} is not a module, so that its parameters are not known. Pass them: "
            "check_policy(policy, observations, parameters=[...])."
        )
    if draws < 16:
        raise TrustRegionError(f"draws is {draws!r}; averages need at least 16 actions per row.")
    trained = (
        _tensors(parameters)
        if parameters is not None or module is None
        else list(module.parameters())
    )
    with torch.random.fork_rng(), _restored(module, trained):
        torch.manual_seed(seed)
        subject = Subject(policy, observations, trained, kl, actions, draws)
        with _restored(module, trained):  # what it moves is for the checks to find
            cause, remedy = _why_not(subject)
        if cause and checks:
            return _nothing_to_check(checks, cause, remedy)
        return PolicyReport(tuple(_findings(checks, subject)))


def assert_policy(policy: Callable[[Any], Any], observations: Any, **options: Any) -> None:
    """Raise where ``check_policy`` finds a fault.

    Args:
        policy: As for ``check_policy``.
        observations: As for ``check_policy``.
        options: As for ``check_policy``.

    Raises:
        AssertionError: If a check fails, with all findings for its text.
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
            Finding(first, Verdict.FAILED, {}, cause, remedy),
            *(
                Finding(name, Verdict.UNDECIDED, {}, "There is no policy to check.")
                for name in rest
            ),
        )
    )


def _findings(checks: Mapping[str, _Check], subject: Subject) -> Iterator[Finding]:
    """Yield what the checks find, an exception that several of them raise once."""
    raised = dict[str, str]()
    for name, check in checks.items():
        finding, error = _run(name, check, subject)
        if error and error in raised:
            cause = f"It raises the same as {raised[error]!r}."
            finding = Finding(name, Verdict.UNDECIDED, {}, cause)
        raised.setdefault(error, name)
        yield finding


def _run(name: str, check: _Check, subject: Subject) -> tuple[Finding, str]:
    """Run a check; what it raises is a finding, too, and returned beside it."""
    try:
        return check(subject), ""
    except Exception as error:  # whatever a policy may raise
        return Finding(name, Verdict.FAILED, {}, _told(error)), _told(error)


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
