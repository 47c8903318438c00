"""For pytest: a fixture, and a class with one test per check."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Collection
from typing import Any, ClassVar

import pytest

from trpo_optim.testing.findings import PolicyReport, Verdict, left_out
from trpo_optim.testing.policy import POLICY_CHECKS, assert_policy, check_policy

__all__ = ["PolicyTests", "assert_sound"]


class PolicyTests:
    """One pytest test per check of ``check_policy``. Subclass it in a test file.

    Attributes:
        policy: A module, a function from observations to a distribution, or a class of modules
            that takes no arguments.
        observations: A tensor, or a tuple or dict of tensors, batch first.
        skip: Names of checks to leave out.
        options: Further arguments of ``check_policy``, such as ``kl`` or ``parameters``.

    Example:
        >>> import torch
        >>> from torch.distributions import Categorical
        >>> from trpo_optim.testing import PolicyTests
        >>> class Policy(torch.nn.Linear):
        ...     def forward(self, observations):
        ...         return Categorical(logits=super().forward(observations))
        >>> class TestMyPolicy(PolicyTests):  # pytest collects it
        ...     policy = Policy(4, 2)
        ...     observations = torch.randn(256, 4)
    """

    policy: Any = None
    observations: Any = None
    skip: ClassVar[Collection[str]] = ()
    options: ClassVar[dict[str, Any]] = {}

    @pytest.fixture
    def policy_report(self) -> PolicyReport:
        """The findings on the policy, shared by all tests of the class."""
        tests: Any = type(self)
        return _report(tests)

    @pytest.mark.parametrize("check", POLICY_CHECKS)
    def test_policy(self, check: str, policy_report: PolicyReport) -> None:
        """A check of the policy passes."""
        if check in left_out(self.skip):
            pytest.skip("left out by the class")
        finding = policy_report[check]
        if finding.verdict is Verdict.UNDECIDED:
            pytest.skip(finding.cause)
        assert finding.verdict is Verdict.PASSED, f"\n{finding}"


@functools.cache
def _report(tests: Any) -> PolicyReport:
    policy = inspect.getattr_static(tests, "policy")  # a function must not become a method
    if isinstance(policy, staticmethod):
        policy = policy.__func__
    if isinstance(policy, type):
        policy = policy()
    if inspect.isfunction(policy) and "self" in inspect.signature(policy).parameters:
        policy = tests().policy
    return check_policy(policy, tests.observations, skip=tests.skip, **tests.options)


@pytest.fixture
def assert_sound() -> Callable[..., None]:
    """Return ``assert_policy``, for tests that make their policies themselves."""
    return assert_policy
