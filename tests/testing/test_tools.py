"""The testing kit from pytest and from the command line."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from trpo_optim import testing
from trpo_optim.testing import (
    POLICY_CHECKS,
)
from trpo_optim.testing.__main__ import main

TESTS = """
import torch
from trpo_optim.testing import PolicyTests
from trpo_optim.testing.strategies import SmallPolicy

pytest_plugins = ["trpo_optim.testing.plugin"]

class TestSound(PolicyTests):
    policy = SmallPolicy(3, 4, "dict")
    observations = torch.randn(32, 3)
    skip = "zero kl"  # which holds another's name

def made(observations):
    return torch.distributions.Categorical(logits=SmallPolicy.weight * observations)

class TestFunction(PolicyTests):
    policy = made
    observations = torch.randn(32, 3)
    options = {"parameters": [torch.ones(3, requires_grad=True)]}

def test_fixture(assert_sound):
    assert_sound(SmallPolicy(3, 4, "beta"), torch.randn(32, 3))
"""


def test_without_pytest_only_its_class_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pytest", None)
    monkeypatch.delitem(sys.modules, "trpo_optim.testing.plugin", raising=False)
    with pytest.raises(ModuleNotFoundError, match=r"PolicyTests needs pytest.*pip install pytest"):
        testing.PolicyTests  # noqa: B018 (asking for it is the test)


def test_the_plugin_gives_one_test_per_check(pytester: pytest.Pytester) -> None:
    pytester.makepyfile(TESTS)
    result = pytester.runpytest("-q", "-p", "no:cacheprovider", "-p", "trpo_optim.testing.plugin")
    outcomes = result.parseoutcomes()
    assert outcomes["passed"] == len(POLICY_CHECKS) - 1 + 1  # one is left out, one is the fixture's
    assert outcomes["failed"] == 1  # SmallPolicy has no weight: the first check says so
    assert outcomes["skipped"] == 1 + len(POLICY_CHECKS) - 1
    result.stdout.fnmatch_lines(["*AttributeError: type object 'SmallPolicy' has no attribute*"])


MODULE = """
import torch
from trpo_optim.testing.strategies import SmallPolicy

class Noisy(SmallPolicy):
    def forward(self, observations):
        return super().forward(observations + torch.randn(()))

sound = SmallPolicy(4, 8, "gaussian")

def make_noisy():
    return Noisy(4, 8, "gaussian")
"""


@pytest.mark.parametrize(
    ("arguments", "status", "says"),
    [
        (["made:sound", "--observation-space", "4"], 0, "passed     step"),
        (["made:sound", "--observation-space", "CartPole-v1"], 0, "passed     step"),
        (["made:sound", "--observation-space", "4", "--method", "forward"], 0, "passed     step"),
        (["made:make_noisy", "--observation-space", "4"], 1, "FAILED     deterministic"),
        (["made:make_noisy", "--observation-space", "4", "--skip", "deterministic"], 0, "passed"),
        (["made:sound", "--observation-space", "Discrete(4)"], 1, "must have the same dtype"),
        (["made:sound", "--observation-space", "Nowhere-v1"], 2, "Give a shape (17 or 4x84x84)"),
        (["made", "--observation-space", "4"], 2, "Write package.module:make_policy"),
        (["made:absent", "--observation-space", "4"], 2, "has no attribute 'absent'"),
        (["nowhere:sound", "--observation-space", "4"], 2, "No module named 'nowhere'"),
    ],
)
def test_the_command_line_prints_findings_and_ends_by_them(
    arguments: list[str],
    status: int,
    says: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    (tmp_path / "made.py").write_text(MODULE)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", sys.path.copy())
    monkeypatch.delitem(sys.modules, "made", raising=False)
    assert main(arguments) == status
    printed = capsys.readouterr()
    assert says in printed.out + printed.err
