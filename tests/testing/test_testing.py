"""The testing kit: every fault is found by the check meant for it, sound policies by none."""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributions as td
from broken import BROKEN_CLOSURES, BROKEN_POLICIES, Custom, Policy, custom_kl, policy_of
from devices import each_device
from families import FAMILIES, Family
from hypothesis import given, settings
from networks import NETWORKS, Network
from problems import Snapshot, gaussian
from profiles import problems
from torch import Tensor, nn
from torch.distributions import AffineTransform, Distribution, Independent, Normal, TanhTransform

from trpo_optim import TrustRegionError, testing
from trpo_optim.testing import (
    CLOSURE_CHECKS,
    POLICY_CHECKS,
    ClosureReport,
    Finding,
    PolicyReport,
    Verdict,
    assert_closure,
    assert_policy,
    check_closure,
    check_policy,
)
from trpo_optim.testing.__main__ import main
from trpo_optim.testing.strategies import SmallPolicy, observations, policies

PAGE = Path(__file__).parents[2] / "docs" / "testing.md"


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
    assert without_figures(told(finding)) == without_figures(written("Policies", name))


@pytest.mark.parametrize("name", BROKEN_CLOSURES)
def test_a_broken_closure_is_found_by_the_check_meant_for_it(name: str) -> None:
    broken = BROKEN_CLOSURES[name]
    finding = closure_report(name)[broken.check]
    assert finding.verdict is Verdict.FAILED
    assert re.search(broken.says, f"{finding.cause} {finding.remedy}")
    assert without_figures(told(finding)) == without_figures(written("Closures", name))


@pytest.mark.parametrize("check", POLICY_CHECKS)
def test_without_any_one_check_a_broken_policy_gets_through(check: str) -> None:
    meant = [name for name, broken in BROKEN_POLICIES.items() if broken.check == check]
    assert any(policy_report(name, skip={check}).passed for name in meant)


@pytest.mark.parametrize("check", CLOSURE_CHECKS)
def test_without_any_one_check_a_broken_closure_gets_through(check: str) -> None:
    meant = [name for name, broken in BROKEN_CLOSURES.items() if broken.check == check]
    assert any(closure_report(name, skip={check}).passed for name in meant)


UNSOUND = {"batch norm", "dropout", "spectral norm", "TransformerEncoder, dropout"}
"""Networks of the optimizer's matrix that do not act as they are updated: these are findings."""

OTHERWISE_CHECKED = {"tokens, padded", "mixture, sampled KL"}
"""Families of several actions per row, and without a closed form of the KL."""


class Sound(nn.Module):
    """A network and a family as one policy."""

    def __init__(self, network: Network, family: Family) -> None:
        super().__init__()
        self.body, self.family = network.body, family
        self.free = nn.Parameter(torch.tensor([-0.3, 0.1, 0.2]))

    def forward(self, observations: tuple[Tensor, ...]) -> Any:
        return self.family.make(self.body(*observations), self.free)


def require_sound(network: str, family: str, seed: int, device: str = "cpu") -> None:
    torch.manual_seed(seed)
    made = NETWORKS[network]().to(device)
    assert_policy(Sound(made, FAMILIES[family]).to(device), made.seen(), seed=seed)


ONE_OF_EACH_KIND = {"MLP", "CNN", "LSTM, packed", "TransformerEncoder, eval", "weight norm"}
ONE_OF_EACH_KIND |= {"torch.compile", "picture, vector and token"}
SOUND_NETWORKS = [
    pytest.param(name, marks=[pytest.mark.thorough] * (name not in ONE_OF_EACH_KIND))
    for name in sorted(NETWORKS.keys() - UNSOUND)
]
SOUND_FAMILIES = sorted(FAMILIES.keys() - OTHERWISE_CHECKED)


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
@pytest.mark.usefixtures("compiler")
@each_device
@pytest.mark.parametrize("network", SOUND_NETWORKS)
def test_no_false_alarm_on_any_network(network: str, device: str) -> None:
    require_sound(network, "Categorical", 0, device)


@each_device
@pytest.mark.parametrize("family", SOUND_FAMILIES)
def test_no_false_alarm_on_any_family(family: str, device: str) -> None:
    require_sound("MLP", family, 0, device)


def layer(inputs: int, outputs: int, gain: float) -> nn.Linear:
    """Return a layer as PPO scripts initialise it."""
    linear = nn.Linear(inputs, outputs)
    nn.init.orthogonal_(linear.weight, gain)
    nn.init.zeros_(linear.bias)
    return linear


class Script(nn.Module):
    """A policy as PPO scripts have it: ReLU or tanh, and a head of small weights."""

    def __init__(self, activation: type[nn.Module], family: Callable[[Tensor], Any]) -> None:
        super().__init__()
        self.network = nn.Sequential(
            layer(6, 32, 2**0.5), activation(), layer(32, 32, 2**0.5), activation()
        )
        self.head, self.family = layer(32, 4, 0.01), family

    def forward(self, observed: Tensor) -> Any:
        return self.family(self.head(self.network(observed / 255.0)))


SCRIPTS: dict[str, Callable[[Tensor], Any]] = {
    "categorical": lambda x: td.Categorical(logits=x),
    "gaussian": lambda x: td.Independent(td.Normal(x, 1.0), 1),
    "squashed to a range": lambda x: td.TransformedDistribution(
        td.Independent(td.Normal(x, 1.0), 1), [TanhTransform(), AffineTransform(0.0, 2.0)]
    ),
    "mixture": lambda x: td.MixtureSameFamily(
        td.Categorical(logits=x[:, :2]), td.Normal(x[:, 2:], 1.0)
    ),
}


@pytest.mark.parametrize("family", SCRIPTS)
@pytest.mark.parametrize(
    ("activation", "whole"),
    [
        (nn.Tanh, False),
        (nn.ReLU, True),
        pytest.param(nn.Tanh, True, marks=pytest.mark.thorough),
        pytest.param(nn.ReLU, False, marks=pytest.mark.thorough),
    ],
)
def test_no_false_alarm_on_policies_as_ppo_scripts_have_them(
    activation: type[nn.Module], family: str, whole: bool
) -> None:
    torch.manual_seed(0)
    observed = torch.randint(256, (128, 6)) if whole else 255 * torch.randn(128, 6)
    assert_policy(Script(activation, SCRIPTS[family]), observed)


@settings(max_examples=problems(share=0.2))
@given(policies(), observations())
def test_no_false_alarm_on_small_policies(policy: SmallPolicy, observed: Tensor) -> None:
    assert_policy(policy, observed)


def test_a_check_leaves_everything_as_it_was() -> None:
    torch.manual_seed(0)
    policy = Policy(middle=nn.Dropout(0.5))
    observed = torch.randn(64, 5)
    before = Snapshot.of(policy)
    check_policy(policy, observed)
    assert before.differences(Snapshot.of(policy)) == []
    problem = gaussian()
    before = Snapshot.of(problem.policy)
    assert_closure(problem.closure, problem.parameters())
    assert before.differences(Snapshot.of(problem.policy)) == []


def test_a_report_reads_as_a_table_and_raises_with_it() -> None:
    report = policy_report("a hotter sampler")
    assert [finding.check for finding in report.findings] == list(POLICY_CHECKS)
    assert [finding.check for finding in report.failures] == ["sampler"]
    with pytest.raises(AssertionError, match="PolicyReport: sampler failed") as caught:
        report.require()
    assert str(report) in str(caught.value)
    assert re.search(
        r"^FAILED +sampler +distance over limit [\d.]+\n    Averages", str(report), re.M
    )
    with pytest.raises(KeyError):
        report["spelling"]


def test_functions_and_methods_can_be_checked_as_well() -> None:
    torch.manual_seed(0)
    weight = torch.randn(3, 2, requires_grad=True)

    def policy(observed: Tensor) -> Distribution:
        return Independent(Normal(observed @ weight, 1.0), 1)

    observed = torch.randn(64, 3)
    assert_policy(policy, observed, parameters=[weight])
    with pytest.raises(TrustRegionError, match=r"not a module.*parameters=\["):
        check_policy(policy, observed)
    agent = Agent()
    report = check_policy(agent.act, torch.randn(64, 5))
    assert report.passed
    assert report["parameters"].cause == "Not used by the policy: critic.weight, critic.bias."


class Agent(nn.Module):
    """An actor and a critic, as PPO scripts have them."""

    def __init__(self) -> None:
        super().__init__()
        self.actor, self.critic = Policy(), nn.Linear(5, 1)

    def act(self, observed: Tensor) -> Any:
        return self.actor(observed)


def test_given_actions_are_used() -> None:
    torch.manual_seed(0)
    policy, observed = Policy(), torch.randn(64, 5)
    actions = policy(observed).sample()
    assert check_policy(policy, observed, actions=actions).passed
    report = check_policy(policy, observed, actions=actions[..., None])
    assert "shape" in report["one action per row"].cause


class Boundless(Custom):
    """A distribution that does not say where its actions lie."""

    support = property(lambda self: _raise())


def _raise() -> None:
    raise NotImplementedError


class Flow(nn.Module):
    """A Gaussian shifted and stretched by what is learned, whose KL has no closed form."""

    def __init__(self) -> None:
        super().__init__()
        self.shift, self.log_scale = nn.Linear(5, 2), nn.Parameter(torch.zeros(2))

    def forward(self, observed: Tensor) -> Distribution:
        base = Normal(torch.zeros(len(observed), 2), 1.0)
        learned = AffineTransform(self.shift(observed), self.log_scale.exp())
        return Independent(td.TransformedDistribution(base, [learned]), 1)


class HeavyTails(nn.Module):
    """A Student's t, which torch knows no KL of."""

    def __init__(self) -> None:
        super().__init__()
        self.mean, self.log_scale = nn.Linear(5, 2), nn.Parameter(torch.zeros(2))

    def forward(self, observed: Tensor) -> Distribution:
        return Independent(td.StudentT(5.0, self.mean(observed), self.log_scale.exp()), 1)


class Squashed(nn.Module):
    """A Gaussian squashed by a transform that remembers its last values."""

    def __init__(self) -> None:
        super().__init__()
        self.mean, self.log_std = nn.Linear(5, 2), nn.Parameter(torch.zeros(2))

    def forward(self, observed: Tensor) -> Distribution:
        normal = Independent(Normal(self.mean(observed), self.log_std.exp()), 1)
        return td.TransformedDistribution(normal, [TanhTransform(cache_size=1)])


@pytest.mark.parametrize("policy", [Flow, HeavyTails, Squashed])
@pytest.mark.parametrize(
    "seed", [0, *(pytest.param(seed, marks=pytest.mark.thorough) for seed in (1, 2))]
)
def test_no_false_alarm_without_a_closed_form_or_with_a_cache(
    policy: type[nn.Module], seed: int
) -> None:
    torch.manual_seed(seed)
    report = check_policy(policy(), torch.randn(64, 5), seed=seed)
    assert report.passed, str(report)
    assert report["kl"].verdict is report["fisher"].verdict is Verdict.PASSED


class Many(nn.Module):
    """A Gaussian of so many dimensions that no proposal covers it."""

    def __init__(self, actions: int) -> None:
        super().__init__()
        self.mean, self.log_std = nn.Linear(5, actions), nn.Parameter(torch.zeros(actions))

    def forward(self, observed: Tensor) -> Distribution:
        return Independent(Normal(self.mean(observed), self.log_std.exp()), 1)


@pytest.mark.parametrize("actions", [50, pytest.param(100, marks=pytest.mark.thorough)])
def test_no_false_alarm_on_actions_of_many_dimensions(actions: int) -> None:
    torch.manual_seed(0)
    report = check_policy(Many(actions), torch.randn(128, 5))
    assert report.passed, str(report)
    assert report["sampler"].verdict is Verdict.UNDECIDED


class Masked(nn.Module):
    """A policy whose observations end in which of four actions are allowed."""

    def __init__(self) -> None:
        super().__init__()
        self.network = nn.Sequential(nn.Linear(5, 16), nn.Tanh(), nn.Linear(16, 4))

    def forward(self, observed: Tensor) -> Distribution:
        seen, allowed = observed.split([5, 4], -1)
        return td.Categorical(logits=self.network(seen).masked_fill(allowed == 0, -torch.inf))


def test_no_false_alarm_on_masks_within_the_observations() -> None:
    torch.manual_seed(0)
    allowed = (torch.rand(64, 4) < 0.5).float()
    allowed[torch.arange(64), torch.randint(4, (64,))] = 1
    assert_policy(Masked(), torch.cat([torch.randn(64, 5), allowed], -1))


@pytest.mark.parametrize("mean", [0.0, 1.0, 5.0, 20.0])
@pytest.mark.parametrize("maximize", [False, True])
def test_the_loss_is_checked_whatever_the_mean_of_the_advantages(
    mean: float, maximize: bool
) -> None:
    problem = gaussian(samples=512)
    advantages = torch.randn(512, dtype=torch.float64) + mean

    def finding(advantages: Tensor, sign: float) -> Verdict:
        def closure() -> Any:
            dist = problem.policy(problem.observations)
            ratio = (dist.log_prob(problem.actions) - problem.old_log_prob).exp()
            return sign * (ratio * advantages).mean(), problem.closure()[1]

        return check_closure(
            closure,
            problem.policy.named_parameters(),
            log_prob=lambda: problem.policy(problem.observations).log_prob(problem.actions),
            advantages=advantages,
            maximize=maximize,
        )["loss"].verdict

    right = 1.0 if maximize else -1.0
    assert finding(advantages, right) is Verdict.PASSED
    assert finding(advantages, -right) is Verdict.FAILED
    assert finding(advantages[:, None], right) is Verdict.FAILED


def test_what_does_not_apply_is_undecided_and_no_failure() -> None:
    torch.manual_seed(0)
    report = check_policy(policy_of(Boundless)(), torch.randn(64, 5), kl=custom_kl)
    assert report.passed
    undecided = [each.check for each in report.findings if each.verdict is Verdict.UNDECIDED]
    assert undecided == ["density", "sampler", "entropy"]
    report = policy_report("an embedding bag")
    assert report["step"].verdict is report["fisher"].verdict is Verdict.UNDECIDED


def test_a_batch_of_another_size_is_named() -> None:
    class First(Policy):
        def dist(self, mean: Tensor, std: Tensor) -> Any:
            return super().dist(mean[:7], std)

    report = check_policy(First(), torch.randn(64, 5))
    assert "batch shape (7,), and there are 64 observations" in report["one action per row"].cause


def test_a_policy_that_rejects_double_precision_is_checked_in_its_own() -> None:
    class Single(Policy):
        def forward(self, observed: Tensor) -> Any:
            return super().forward(observed.float())

        def double(self) -> Any:
            raise TypeError("single precision alone")

    torch.manual_seed(0)
    assert_policy(Single(), torch.randn(128, 5))


@pytest.mark.parametrize(
    ("observed", "options", "message"),
    [
        (np.zeros((8, 5)), {}, "observations hold a ndarray.*torch.as_tensor"),
        (None, {}, "observations hold a NoneType"),
        (torch.zeros(0, 5), {}, r"have \[0\] rows.*at least 2"),
        ((torch.zeros(3), {"b": torch.zeros(4)}), {}, r"have \[3, 4\] rows"),
        (torch.zeros(4, 5), {"draws": 1}, "draws is 1"),
    ],
)
def test_what_cannot_be_checked_is_refused(observed: Any, options: Any, message: str) -> None:
    with pytest.raises(TrustRegionError, match=message):
        check_policy(Policy(), observed, **options)


def test_a_policy_that_raises_is_one_finding() -> None:
    report = check_policy(Policy(), torch.randn(8, 4))
    assert len(report.failures) == 1
    assert "mat1 and mat2 shapes cannot be multiplied" in report.failures[0].cause
    assert check_policy(Policy(), torch.randn(64, 5), skip="step").passed


@pytest.mark.parametrize("call", [check_policy, check_closure])
def test_an_unknown_check_to_skip_is_named(call: Any) -> None:
    with pytest.raises(TrustRegionError, match=r"skip names \['spelling'\]"):
        call(Policy(), [], skip=["spelling"])


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


SECTIONS: dict[str, dict[str, Any]] = {"Policies": BROKEN_POLICIES, "Closures": BROKEN_CLOSURES}


def told(finding: Finding) -> str:
    """Return what a finding says, in one line."""
    return " ".join(f"{finding.cause} {finding.remedy}".split())


def head(name: str, check: str) -> str:
    """Return how a fault is introduced on the page."""
    return f"**{name[0].upper()}{name[1:]}** (`{check}`). "


def written(heading: str, name: str) -> str:
    """Return what the page says of a fault."""
    _, _, section = PAGE.read_text().partition(f"## {heading}\n")
    start = head(name, SECTIONS[heading][name].check)
    lines = [line for line in section.splitlines() if line.startswith(start)]
    return lines[0].removeprefix(start) if lines else ""


def found(heading: str, name: str) -> str:
    """Return what the kit says of it now."""
    report = policy_report if heading == "Policies" else closure_report
    return told(report(name)[SECTIONS[heading][name].check])


def page(said: Callable[[str, str], str]) -> str:
    """Return docs/testing.md, with what is said of each fault."""
    sections = []
    for heading, names in SECTIONS.items():
        sections.append(f"## {heading}\n")
        for name, broken in names.items():
            sections.append(f"{head(name, broken.check)}{said(heading, name)}\n")
    return INTRODUCTION + "\n".join(sections)


INTRODUCTION = """# Testing a policy

`check_policy` finds out whether a policy is sound; `check_closure` does the same for a handwritten
closure.

```python
import torch
from trpo_optim.testing import PolicyTests, assert_policy, check_closure, check_policy

print(check_policy(policy, observations))  # a table: what was checked, measured, found
assert_policy(policy, observations)  # raises with that table


class TestMyPolicy(PolicyTests):  # in pytest, which this needs: one test per check
    policy = MyPolicy()
    observations = torch.randn(256, 17)


print(  # where step() would be called
    check_closure(
        closure,
        policy.parameters(),
        log_prob=lambda: log_prob(policy(observations), actions),
        advantages=advantages,
    )
)
```

```sh
python -m trpo_optim.testing package.module:make_policy --observation-space 17
```

A policy is a module, a method of one (`agent.dist`) or, with `parameters=`, any function from
observations to a distribution, or a tuple or dict of them; observations are a tensor, or a tuple or
dict of them. Pass real ones where you have them. Findings come in the order in which a fault is
best read: what fails first explains what fails after it. `kl=` takes a KL of your own; without it,
that of policies that have none in closed form is estimated. `skip=` leaves checks out: `score`
where the policy computes in lower precision than its parameters have (autocast), so that
differences are rounding. A policy over sequences of tokens is checked as `Independent(dist, 1)`.

`check_closure` takes `maximize=True` where the optimizer has it. A closure's `sampled_kl` passes
with `low_variance=True`; the plain one has a slope on any one sample.

| check | finds |
| --- | --- |
| `state` | parameters, buffers, observations and flags that an evaluation moves |
| `one action per row` | log_prob that is not one number per observation |
| `deterministic` | dropout, noise |
| `rows` | batch normalisation and reductions across the batch |
| `parameters` | what is detached on the way; it names what the policy does not use |
| `finite` | NaN and infinity at zeros and at the corners of the observations' range |
| `density` | log_prob that does not normalise |
| `sampler` | samples that do not follow log_prob |
| `entropy` | entropy() that is not the mean of −log_prob |
| `score` | a gradient of log_prob that is not its slope |
| `zero kl` | a KL that is not zero, least and smooth where both policies are one |
| `kl` | a KL that is not the mean of ln(old/new), such as one averaged over dimensions |
| `second order` | operations without second derivatives |
| `fisher` | Fisher-vector products that are not the KL's curvature and the scores' spread |
| `step` | a step that fails, or does not do what the local model says as the radius shrinks |

Averages over drawn actions are compared within what noise explains: each comparison finds a sound
policy at fault once in ten million. `undecided` is a check that does not apply, such as the entropy
of a family that states none, or whose averages would be noise, such as those over fifty dimensions.

`trpo_optim.testing.strategies` has Hypothesis strategies for observations and small sound policies;
`trpo_optim.testing.plugin` the fixture `assert_sound` (`pytest_plugins = [...]` in conftest.py).

What follows is what the kit says of policies and closures with one fault each, written by
`UPDATE_DOCS=1 pytest tests/test_testing.py`.

"""


def without_figures(text: str) -> str:
    return re.sub(r"-?\d[\d.e+-]*", "#", text)


def test_the_page_has_every_fault_in_its_order() -> None:
    """What it says of each is compared where the fault is found."""
    if os.environ.get("UPDATE_DOCS"):
        PAGE.write_text(page(found))
    assert PAGE.read_text() == page(written)
