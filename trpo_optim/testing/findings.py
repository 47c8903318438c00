"""What a check found, and a report of many."""

from __future__ import annotations

import enum
import textwrap
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from typing import TypeVar

from trpo_optim.errors import TrustRegionError

__all__ = ["ClosureReport", "Finding", "PolicyReport", "Verdict", "left_out", "without"]


SubjectT = TypeVar("SubjectT")


class Verdict(enum.Enum):
    """How a check ended."""

    PASSED = "passed"
    FAILED = "FAILED"
    UNDECIDED = "undecided"


@dataclass(frozen=True)
class Finding:
    """One check's result.

    Attributes:
        check: The check's name.
        verdict: How it ended.
        figures: What it measured.
        cause: What is wrong, or why it could not be decided; else empty.
        remedy: What to do about it, or empty.
    """

    check: str
    verdict: Verdict
    figures: Mapping[str, float] = field(default_factory=dict)
    cause: str = ""
    remedy: str = ""

    def __str__(self) -> str:
        """Return the finding as a line, and cause and remedy below it."""
        figures = ", ".join(f"{name} {value:.4g}" for name, value in self.figures.items())
        line = f"{self.verdict.value:<9}  {self.check:<18} {figures}".rstrip()
        told = " ".join(filter(None, (self.cause, self.remedy)))
        return "\n".join(
            [line, *textwrap.wrap(told, 96, initial_indent="    ", subsequent_indent="    ")]
        )


@dataclass(frozen=True)
class _Report:
    """Findings in the order in which a fault is best read: the first failure is the cause."""

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
        """Raise if a check failed.

        Raises:
            AssertionError: With the table for its text.
        """
        if not self.passed:
            names = ", ".join(finding.check for finding in self.failures)
            raise AssertionError(f"{type(self).__name__}: {names} failed\n{self}")


class PolicyReport(_Report):
    """What ``check_policy`` found."""


class ClosureReport(_Report):
    """What ``check_closure`` found."""


def left_out(skip: Collection[str]) -> set[str]:
    """Return the names of the checks that are left out, of which one may be given as it is."""
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
            f"skip names {sorted(unknown)}, which are no checks. There are {list(checks)}."
        )
    return {name: check for name, check in checks.items() if name not in skipped}
