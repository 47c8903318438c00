"""Unit tests for custom policies and closures. They need torch only; PolicyTests needs pytest."""

from typing import TYPE_CHECKING, Any

from trpo_optim.testing.closure import CLOSURE_CHECKS, assert_closure, check_closure
from trpo_optim.testing.findings import ClosureReport, Finding, PolicyReport, Verdict
from trpo_optim.testing.policy import POLICY_CHECKS, assert_policy, check_policy

if TYPE_CHECKING:
    from trpo_optim.testing.plugin import PolicyTests

__all__ = [
    "CLOSURE_CHECKS",
    "POLICY_CHECKS",
    "ClosureReport",
    "Finding",
    "PolicyReport",
    "PolicyTests",
    "Verdict",
    "assert_closure",
    "assert_policy",
    "check_closure",
    "check_policy",
]


def __getattr__(name: str) -> Any:
    """Import ``PolicyTests``, which needs pytest, on first use."""
    if name != "PolicyTests":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    try:
        from trpo_optim.testing.plugin import PolicyTests
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            f"PolicyTests needs pytest ({error}). Run: pip install pytest. The other names of "
            f"{__name__} need torch only.",
            name=error.name,
        ) from error

    return PolicyTests
