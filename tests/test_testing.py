"""The testing kit: every fault is found by the check meant for it, sound policies by none."""

from __future__ import annotations

import re

import pytest
import torch
from broken import BROKEN_CLOSURES, BROKEN_POLICIES

from trpo_optim.testing import (
    CLOSURE_CHECKS,
    POLICY_CHECKS,
    ClosureReport,
    PolicyReport,
    Verdict,
    check_closure,
    check_policy,
)


def policy_report(name: str, *, skip: set[str] | None = None) -> PolicyReport:
    broken = BROKEN_POLICIES[name]
    torch.manual_seed(0)
    policy = broken.make()
    return check_policy(policy, broken.observations(), skip=skip or set(), **broken.options)


def closure_report(name: str, *, skip: set[str] | None = None) -> ClosureReport:
    broken = BROKEN_CLOSURES[name]
    problem = broken.problem()
    closure = broken.make(problem)
    return check_closure(
        closure, problem.parameters(), skip=skip or set(), **broken.options(problem)
    )


@pytest.mark.parametrize("name", BROKEN_POLICIES)
def test_a_broken_policy_is_found_by_the_check_meant_for_it(name: str) -> None:
    broken = BROKEN_POLICIES[name]
    finding = policy_report(name)[broken.check]
    assert finding.verdict is Verdict.FAILED
    assert re.search(broken.says, f"{finding.cause} {finding.remedy}")


@pytest.mark.parametrize("name", BROKEN_CLOSURES)
def test_a_broken_closure_is_found_by_the_check_meant_for_it(name: str) -> None:
    broken = BROKEN_CLOSURES[name]
    finding = closure_report(name)[broken.check]
    assert finding.verdict is Verdict.FAILED
    assert re.search(broken.says, f"{finding.cause} {finding.remedy}")


@pytest.mark.parametrize("check", POLICY_CHECKS)
def test_without_any_one_check_a_broken_policy_gets_through(check: str) -> None:
    meant = [name for name, broken in BROKEN_POLICIES.items() if broken.check == check]
    assert any(policy_report(name, skip={check}).passed for name in meant)


@pytest.mark.parametrize("check", CLOSURE_CHECKS)
def test_without_any_one_check_a_broken_closure_gets_through(check: str) -> None:
    meant = [name for name, broken in BROKEN_CLOSURES.items() if broken.check == check]
    assert any(closure_report(name, skip={check}).passed for name in meant)
