"""check_policy: every check of a policy, in the order in which faults are best read."""

from __future__ import annotations

import textwrap
from collections.abc import Callable, Collection, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from trpo_optim.distributions.parts import leaves
from trpo_optim.errors import TrustRegionError
from trpo_optim.testing.behaviour_checks import (
    check_determinism,
    check_finite,
    check_parameters,
    check_rows,
    check_state,
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
from trpo_optim.testing.findings import Finding, PolicyReport, Verdict, without
from trpo_optim.testing.step_checks import check_step
from trpo_optim.testing.subject import Subject, module_of

__all__ = ["POLICY_CHECKS", "assert_policy", "check_policy"]

_Check = Callable[[Subject], Finding]


def _in_double_precision(check: _Check) -> _Check:
    return lambda subject: check(subject.precise)


POLICY_CHECKS: dict[str, _Check] = {
    "state": check_state,
    "one action per row": check_shapes,
    "deterministic": check_determinism,
    "rows": check_rows,
    "parameters": check_parameters,
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
    parameters: Iterable[Tensor] | None = None,
    skip: Collection[str] = (),
    draws: int = 256,
    seed: int = 0,
) -> PolicyReport:
    """Find out whether a policy is sound, and if not, why.

    Parameters, buffers, gradients and the random state are afterwards what they were.

    Args:
        policy: From observations to a ``torch.distributions.Distribution``, or a tuple or dict of
            them: a module, a method of one (``agent.dist``), or any function.
        observations: A tensor, or a tuple or dict of them, the batch first; best real ones.
        actions: Taken at the observations, as ``log_prob`` has them; None: sampled.
        kl: From the old and the new distribution to their mean KL, in nats. None: ``mean_kl``, or
            where that has no closed form ``sampled_kl`` on drawn actions.
        parameters: What is trained; needed where ``policy`` is neither a module nor its method.
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
    if parameters is None:
        parameters = [] if module is None else module.parameters()
    trained = list(parameters)
    with torch.random.fork_rng(), _restored(module, trained):
        torch.manual_seed(seed)
        subject = Subject(policy, observations, trained, kl, actions, draws)
        with _restored(module, trained):  # what it moves is for the checks to find
            cause = _why_not(subject)
        if cause and checks:
            return _nothing_to_check(checks, cause)
        return PolicyReport(tuple(_run(name, check, subject) for name, check in checks.items()))


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


def _why_not(subject: Subject) -> str:
    """Return why the policy cannot be evaluated to distributions, or an empty string."""
    try:
        leaves(subject.raw(subject.observations))
    except Exception as error:  # whatever a policy may raise
        return _told(error)
    return ""


def _nothing_to_check(checks: Iterable[str], cause: str) -> PolicyReport:
    """Return one finding of what is wrong, and nothing on all that would follow from it."""
    first, *rest = checks
    return PolicyReport(
        (
            Finding(first, Verdict.FAILED, {}, cause),
            *(
                Finding(name, Verdict.UNDECIDED, {}, "There is no policy to check.")
                for name in rest
            ),
        )
    )


def _run(name: str, check: _Check, subject: Subject) -> Finding:
    """Run a check; what it raises is a finding, too."""
    try:
        return check(subject)
    except Exception as error:  # whatever a policy may raise
        return Finding(name, Verdict.FAILED, {}, _told(error))


def _told(error: Exception) -> str:
    return textwrap.shorten(f"{type(error).__name__}: {error}", 400)


@contextmanager
def _restored(module: nn.Module | None, parameters: Iterable[Tensor]) -> Iterator[None]:
    """Put parameters, buffers and training modes back at the end."""
    modules = [] if module is None else list(module.modules())
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
