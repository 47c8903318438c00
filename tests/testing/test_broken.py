"""Every broken policy and closure is found by the check meant for it; a page says so."""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from broken_closures import BROKEN_CLOSURES
from broken_policies import BROKEN_POLICIES
from broken_reports import policy_report

from trpo_optim.testing import (
    CLOSURE_CHECKS,
    POLICY_CHECKS,
    ClosureReport,
    Finding,
    Verdict,
    check_closure,
)

PAGE = Path(__file__).parents[2] / "docs" / "how-to" / "test-your-policy.md"


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


@pytest.mark.slow
@pytest.mark.parametrize("check", POLICY_CHECKS)
def test_without_any_one_check_a_broken_policy_gets_through(check: str) -> None:
    meant = [name for name, broken in BROKEN_POLICIES.items() if broken.check == check]
    assert any(policy_report(name, skip={check}).passed for name in meant)


@pytest.mark.slow
@pytest.mark.parametrize("check", CLOSURE_CHECKS)
def test_without_any_one_check_a_broken_closure_gets_through(check: str) -> None:
    meant = [name for name, broken in BROKEN_CLOSURES.items() if broken.check == check]
    assert any(closure_report(name, skip={check}).passed for name in meant)


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
    """Return docs/how-to/test-your-policy.md, with what is said of each fault."""
    sections = []
    for heading, names in SECTIONS.items():
        sections.append(f"## {heading}\n")
        for name, broken in names.items():
            sections.append(f"{head(name, broken.check)}{said(heading, name)}\n")
    return INTRODUCTION + "\n".join(sections)


INTRODUCTION = """# Test your policy

`check_policy` checks a policy for faults. `check_closure` checks a handwritten closure.

```python
import torch
from torch import nn
from torch.distributions import Independent, Normal

from trpo_optim import frozen, log_prob, mean_kl
from trpo_optim.testing import PolicyTests, assert_policy, check_closure, check_policy


class MyPolicy(nn.Module):
    def __init__(self):
        super().__init__()
        self.mean, self.log_std = nn.Linear(17, 6), nn.Parameter(torch.zeros(6))

    def forward(self, observations):
        return Independent(Normal(self.mean(observations), self.log_std.exp()), 1)


policy, observations, advantages = MyPolicy(), torch.randn(256, 17), torch.randn(256)
print(check_policy(policy, observations))  # a table: what was checked, measured, found
assert_policy(policy, observations)  # raises with that table


class TestMyPolicy(PolicyTests):  # needs pytest; makes one test per check
    policy = MyPolicy()
    observations = torch.randn(256, 17)


with torch.no_grad():
    old_dist = frozen(policy(observations))
    actions = old_dist.sample()


def closure():
    dist = policy(observations)
    ratio = (log_prob(dist, actions) - log_prob(old_dist, actions)).exp()
    return -(ratio * advantages).mean(), mean_kl(old_dist, dist), dist


print(  # in place of step()
    check_closure(
        closure,
        policy.parameters(),
        log_prob=lambda: log_prob(policy(observations), actions),
        advantages=advantages,
        mask=None,  # for padded sequences, true where a token counts
    )
)
```

```sh
python -m trpo_optim.testing package.module:make_policy --observation-space 17
```

Read the report from the top. The first fault often explains the faults after it.

## What `check_policy` takes

- **Policy.** Pass a module or a method of a module (`agent.dist`). With `parameters=`, you can pass
  any function. It maps observations to a distribution, or to a tuple or dict of distributions.
- **Observations.** Pass a tensor, or a tuple or dict of tensors. Real observations are best. You
  can also pass another object that holds tensors, such as a batch of graphs. It is checked as a
  whole, so `rows` and `finite` are undecided.
- **Tokens.** A sequence of tokens, a `Categorical` of shape (N, T, V), counts as one action per
  row.
- **KL.** `kl=` takes your own KL. Without it, the KL is estimated if it has no closed form.
- **Checks.** `skip=` leaves checks out.
- **Precision.** Part of a policy may compute in lower precision than its parameters have
  (autocast). Such a policy is checked in single precision. `score` is undecided if the differences
  are rounding.

## What `check_closure` takes

Pass `maximize=True` if the optimizer has it. With `mask=`, `check_closure` also finds a loss or a
KL that is averaged over prompt or padding.

It takes what `step` takes: one closure, a list of closures for micro-batches, or `Closures`, as
`token_closures` returns them. Each closure of a list is checked, one at a time. The finding names
the closure at fault. `log_prob`, `advantages` and `mask` are of all closures together, in their
order.

The KL of the closure must be the mean KL(old ‖ new) over the batch, not the sum and not
KL(new ‖ old). It is compared with the KL of the third value. Without a third value, it is compared
with the KL of the distributions that the closure makes. If the closure makes no distribution, it is
compared with its `log_prob`, on 32 actions or more. `sampled_kl` passes with `low_variance=True`.
The plain estimator has a slope on any one sample.

| check of `check_closure` | finds |
| --- | --- |
| `values` | a return of another form, `backward()`, NaN; it notes what no step would move |
| `deterministic` | a new minibatch in every call, dropout, noise |
| `zero kl` | a KL that is not zero at the present parameters, such as one with a penalty |
| `moving kl` | a KL that stays zero, since the old policy is made inside the closure |
| `kl` | a KL that is not least at the present parameters, or not smooth there |
| `kl scale` | a sum over the batch, a mean over padding, dimensions or some rows, KL(new ‖ old) |
| `loss` | a wrong sign, shapes that broadcast, a loss over padding; notes stale log-probabilities |
| `loss slope` | a loss whose values do not follow its gradient: a part is detached, or has a kink |
| `second order` | a loss on parameters, or rows of a weight, on which the KL does not depend |

`loss` needs `log_prob` and `advantages`.

## The checks of `check_policy`

| check | finds |
| --- | --- |
| `state` | an evaluation that changes or keeps parameters, buffers, flags, features or statistics |
| `one action per row` | log_prob that is not one number per observation |
| `deterministic` | dropout, noise |
| `rows` | batch normalisation and reductions across the batch |
| `parameters` | parameters that are detached on the way, and parameters that are not used |
| `arguments` | a scale that may become negative or is clamped, probabilities given as logits |
| `finite` | NaN and infinity at zeros and at the corners of the observations' range |
| `density` | log_prob that does not normalise |
| `sampler` | samples that do not follow log_prob |
| `entropy` | entropy() that is not the mean of −log_prob |
| `score` | a gradient of log_prob that is not its slope |
| `zero kl` | a KL that is not zero, minimal and smooth if both policies are the same |
| `kl` | a KL that is not the mean of ln(old/new), such as one averaged over dimensions |
| `second order` | no Fisher-vector products; a loss on parameters that the KL does not depend on |
| `fisher` | Fisher-vector products that differ from the KL's curvature or the scores' spread |
| `step` | a step that fails, or does not follow the local model as the radius shrinks |

Averages over sampled actions have noise. The tolerance of each comparison includes this noise: a
sound policy fails once in ten million. A check is `undecided` if it does not apply, for example the
entropy of a family that has none. It is also `undecided` if its averages would be noise, for
example over fifty dimensions.

A check is also `undecided` if rounding hides what it measures. Rounding hides much of a policy with
a very small scale, of actions close to the edge of the support, and of half precision. Check such a
policy in float64.

`trpo_optim.testing.strategies` has Hypothesis strategies for observations and small sound policies.
`trpo_optim.testing.plugin` has the fixture `assert_sound`. To use it, add the module to
`pytest_plugins` in conftest.py.

The rest of this page shows the messages for policies and closures with one fault each.
`UPDATE_DOCS=1 pytest tests/testing/test_broken.py` writes these messages.

"""


def without_figures(text: str) -> str:
    return re.sub(r"-?\d[\d.e+-]*", "#", text)


def test_the_page_has_every_fault_in_its_order() -> None:
    """What it says of each is compared where the fault is found."""
    if os.environ.get("UPDATE_DOCS"):
        PAGE.write_text(page(found))
    assert PAGE.read_text() == page(written)
