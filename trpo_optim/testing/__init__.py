"""Unit tests for custom policies and closures; needs torch alone."""

from trpo_optim.testing.closure import CLOSURE_CHECKS, assert_closure, check_closure
from trpo_optim.testing.findings import ClosureReport, Finding, PolicyReport, Verdict
from trpo_optim.testing.policy import POLICY_CHECKS, assert_policy, check_policy

__all__ = [
    "CLOSURE_CHECKS",
    "POLICY_CHECKS",
    "ClosureReport",
    "Finding",
    "PolicyReport",
    "Verdict",
    "assert_closure",
    "assert_policy",
    "check_closure",
    "check_policy",
]
