"""The finding of a check, and the report of all checks."""

from __future__ import annotations

import enum
import textwrap
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass, field
from typing import TypeVar

from trpo_optim.errors import TrustRegionError

__all__ = [
    "ClosureReport",
    "Finding",
    "PolicyReport",
    "Verdict",
    "each_of",
    "failed",
    "left_out",
    "named",
    "undecided",
    "without",
]


SubjectT = TypeVar("SubjectT")


class Verdict(enum.Enum):
    """How a check ended.

    Example:
        >>> from trpo_optim.testing import Verdict
        >>> [verdict.value for verdict in Verdict]
        ['passed', 'FAILED', 'undecided']
    """

    PASSED = "passed"
    """The check found no fault."""
    FAILED = "FAILED"
    """The check found a fault. The finding has its cause and a remedy."""
    UNDECIDED = "undecided"
    """The check could not be made. The finding says why."""


@dataclass(frozen=True)
class Finding:
    """The result of one check.

    Attributes:
        check: The check's name.
        verdict: How it ended.
        figures: The measured numbers by name.
        cause: What is wrong, or why the check is undecided. Otherwise empty.
        remedy: What to do. Empty if there is nothing to do.

    Example:
        >>> from trpo_optim.testing import Finding, Verdict
        >>> finding = Finding("kl", Verdict.FAILED, {"kl": 0.5}, "Wrong KL.", "Use mean_kl().")
        >>> print(finding)
        FAILED     kl                 kl 0.5
            Wrong KL. Use mean_kl().
    """

    check: str
    verdict: Verdict
    figures: Mapping[str, float] = field(default_factory=dict)
    cause: str = ""
    remedy: str = ""

    def __str__(self) -> str:
        """Return the finding as one line, with cause and remedy below."""
        figures = ", ".join(f"{name} {value:.4g}" for name, value in self.figures.items())
        line = f"{self.verdict.value:<9}  {self.check:<18} {figures}".rstrip()
        told = " ".join(filter(None, (self.cause, self.remedy)))
        return "\n".join(
            [line, *textwrap.wrap(told, 96, initial_indent="    ", subsequent_indent="    ")]
        )


@dataclass(frozen=True)
class _Report:
    """Findings in the order of causes: the first failure often explains later ones."""

    findings: tuple[Finding, ...]

    @property
    def passed(self) -> bool:
        """Whether no check failed."""
        return not self.failures

    @property
    def failures(self) -> tuple[Finding, ...]:
        """The findings of the checks that failed."""
        return tuple(each for each in self.findings if each.verdict is Verdict.FAILED)

    def __getitem__(self, check: str) -> Finding:
        """Return the finding of a check, by name."""
        for finding in self.findings:
            if finding.check == check:
                return finding
        raise KeyError(check)

    def __str__(self) -> str:
        """Return a table of all findings."""
        return "\n".join(map(str, self.findings))

    def require(self) -> None:
        """Raise an error if a check failed.

        Raises:
            AssertionError: If a check failed. The text is the table of all findings.
        """
        if not self.passed:
            names = ", ".join(finding.check for finding in self.failures)
            raise AssertionError(f"{type(self).__name__}: {names} failed\n{self}")


class PolicyReport(_Report):
    """The findings of ``check_policy``.

    Example:
        >>> from trpo_optim.testing import Finding, PolicyReport, Verdict
        >>> report = PolicyReport((Finding("finite", Verdict.PASSED),))
        >>> report.passed, report["finite"].verdict.value
        (True, 'passed')
    """


class ClosureReport(_Report):
    """The findings of ``check_closure``.

    Example:
        >>> from trpo_optim.testing import ClosureReport, Finding, Verdict
        >>> report = ClosureReport((Finding("values", Verdict.FAILED, cause="One value."),))
        >>> report.passed, [finding.check for finding in report.failures]
        (False, ['values'])
    """


def failed(check: str, figures: Mapping[str, float], cause: str, remedy: str = "") -> Finding:
    """Return the finding of a fault."""
    return Finding(check, Verdict.FAILED, figures, cause, remedy)


def undecided(check: str, cause: str, remedy: str = "") -> Finding:
    """Return the finding of a check that could not be made."""
    return Finding(check, Verdict.UNDECIDED, {}, cause, remedy)


def each_of(
    checks: Mapping[str, Callable[[], Finding]], told: Callable[[Exception], str]
) -> Iterator[Finding]:
    """Yield what checks find. What one raises is a finding too, and told once.

    Args:
        checks: By name.
        told: What is to be said of an exception.

    Yields:
        A finding for each check.
    """
    raised = dict[str, str]()
    for name, check in checks.items():
        found = _run(check)
        if not isinstance(found, Exception):
            yield found
        elif (cause := told(found)) in raised:
            yield undecided(name, f"It raises the same as {raised[cause]!r}.")
        else:
            raised[cause] = name
            yield failed(name, {}, cause)


def _run(check: Callable[[], Finding]) -> Finding | Exception:
    try:
        return check()
    except Exception as error:  # whatever a policy or a closure may raise
        return error


def named(closure: str, cause: str) -> str:
    """Return a cause with the closure that it was found in.

    Args:
        closure: Which of several closures it is. Empty if there is only one.
        cause: What is wrong.
    """
    return f"In {closure}: {cause}" if closure else cause


def left_out(skip: Collection[str]) -> set[str]:
    """Return the names of the checks to leave out. ``skip`` may be a single name."""
    return {skip} if isinstance(skip, str) else set(skip)


def without(
    checks: Mapping[str, Callable[[SubjectT], Finding]], skip: Collection[str]
) -> dict[str, Callable[[SubjectT], Finding]]:
    """Return the checks that are not left out.

    Args:
        checks: By name.
        skip: Names of those to leave out, or one name.

    Returns:
        The others.

    Raises:
        TrustRegionError: If ``skip`` names no check.
    """
    skipped = left_out(skip)
    unknown = skipped - set(checks)
    if unknown:
        raise TrustRegionError(
            f"skip names {sorted(unknown)}, which are no checks. The checks are {list(checks)}."
        )
    return {name: check for name, check in checks.items() if name not in skipped}
