"""No check takes a sound policy for a faulty one."""

from __future__ import annotations

import re
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from broken import Policy
from broken_arguments import CachedFeatures
from sound_policies import (
    MADE,
    OBSERVATIONS,
    ROWS,
    Keeping,
    LanguageModel,
    Made,
    Normalising,
    PositiveLogarithm,
    Tabled,
    observations,
)
from torch import Tensor, nn
from torch.distributions import Categorical, Distribution, Independent, Normal

from trpo_optim.testing import Verdict, assert_policy, check_policy

pytestmark = pytest.mark.no_cover


@pytest.mark.parametrize("name", MADE)
def test_no_false_alarm_on_how_distributions_are_made(name: str) -> None:
    torch.manual_seed(0)
    assert_policy(Made(MADE[name]), observations())


@pytest.mark.parametrize("policy", [Keeping, Tabled, Normalising])
def test_no_false_alarm_on_what_a_policy_keeps(policy: type[nn.Module]) -> None:
    torch.manual_seed(0)
    made, seen = policy(), observations()
    kept = {name: value for name, value in vars(made).items() if name not in vars(nn.Module())}
    assert_policy(made, seen)
    assert all(vars(made)[name] is value for name, value in kept.items())
    made(seen)
    assert_policy(made, seen)


def test_plain_tensors_that_no_checkpoint_holds_are_mentioned() -> None:
    torch.manual_seed(0)
    report = check_policy(Normalising(), observations())
    assert "state_dict() and to() leave out: mean, deviation." in report["state"].cause


def test_features_that_were_cached_before_the_check_are_named() -> None:
    torch.manual_seed(0)
    policy, seen = CachedFeatures(), torch.randn(ROWS, OBSERVATIONS)
    policy(seen)
    first = check_policy(policy, seen).failures[0]
    assert first.check == "rows"
    assert "caches features of other observations" in first.cause
    assert policy.features is not None


def test_no_false_alarm_at_zeros_that_no_observation_is_near() -> None:
    torch.manual_seed(0)
    assert_policy(PositiveLogarithm(), observations().abs() + 0.1)


def test_a_mask_that_made_up_observations_leave_nothing_of_is_undecided() -> None:
    torch.manual_seed(0)
    report = check_policy(Made(MADE["a mask computed from observations"]), observations())
    assert report["finite"].verdict is Verdict.UNDECIDED
    assert "may rule out all" in report["finite"].cause


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("last", [True, False])
def test_layers_that_compute_in_single_precision_are_no_fault(
    last: bool, dtype: torch.dtype
) -> None:
    torch.manual_seed(0)
    model, tokens = LanguageModel(last=last).to(dtype), torch.randint(11, (16, 6))
    report = check_policy(model, tokens, draws=64)
    assert report.passed, str(report)
    assert report["score"].verdict is Verdict.PASSED


def test_differences_that_are_rounding_are_undecided() -> None:
    class Coarse(Policy):
        def forward(self, seen: Tensor) -> Any:
            with torch.autocast("cpu", dtype=torch.bfloat16):
                mean = self.head(self.body(seen))
            return self.dist(mean.float(), self.log_std.exp())

    torch.manual_seed(0)
    report = check_policy(Coarse(), torch.randn(64, 5))
    assert report["score"].verdict is Verdict.UNDECIDED
    assert "lower precision than its parameters" in report["score"].cause


def test_a_sequence_of_tokens_is_one_action_per_row() -> None:
    torch.manual_seed(0)
    model, tokens = LanguageModel(last=False), torch.randint(11, (16, 6))
    report = check_policy(model, tokens, draws=64)
    assert report.passed, str(report)
    assert report["kl"].verdict is report["step"].verdict is Verdict.PASSED
    assert "A row of (6,) actions, such as tokens" in report["one action per row"].cause
    wrapped = check_policy(
        lambda seen: Independent(model(seen), 1), tokens, draws=64, parameters=model.parameters()
    )
    assert wrapped.passed, str(wrapped)
    figures = [each["kl"].figures["mean of ln(old/new)"] for each in (report, wrapped)]
    assert figures[0] == pytest.approx(figures[1], rel=0.2)  # by other draws


@pytest.mark.parametrize(
    "form",
    [
        lambda policy: policy.named_parameters(),
        lambda policy: list(policy.named_parameters()),
        lambda policy: [{"params": list(policy.parameters())}],
        lambda policy: [
            {"params": policy.body.parameters(), "lr": 1.0},
            {"params": [policy.log_std, *policy.head.parameters()]},
        ],
        lambda policy: [{"params": list(policy.named_parameters())}],
    ],
    ids=["named", "list of named", "group", "two groups", "named group"],
)
def test_parameters_are_taken_in_every_form_that_the_optimizer_takes(form: Any) -> None:
    torch.manual_seed(0)
    policy = Policy()
    seen = torch.randn(ROWS, OBSERVATIONS)
    assert_policy(policy, seen, parameters=form(policy))
    assert_policy(lambda obs: policy(obs), seen, parameters=form(policy))


@dataclass
class Graphs:
    """A batch of graphs as libraries for these have it: nodes, edges, and whose node each is."""

    x: Tensor
    edge_index: Tensor
    batch: Tensor
    names: tuple[str, ...] = ("left", "right")

    def to(self, device: str) -> Graphs:
        return Graphs(self.x.to(device), self.edge_index.to(device), self.batch.to(device))


def graphs(rows: int = 24) -> Graphs:
    nodes = 4 * rows
    start = 4 * torch.arange(rows).repeat_interleave(6)
    edges = start + torch.randint(4, (2, len(start)))
    return Graphs(torch.randn(nodes, 3), edges, torch.arange(rows).repeat_interleave(4))


class MessagePassing(nn.Module):
    """One round of messages, and the mean over a graph's nodes."""

    def __init__(self) -> None:
        super().__init__()
        self.message, self.head = nn.Linear(3, 8), nn.Linear(8, 3)

    def forward(self, data: Any) -> Distribution:
        source, target = data.edge_index
        sent = self.message(data.x)
        received = torch.zeros_like(sent).index_add(0, target, sent[source]).tanh()
        rows = int(data.batch.max()) + 1
        pooled = torch.zeros(rows, sent.shape[1]).to(sent).index_add(0, data.batch, received)
        return Categorical(logits=self.head(pooled / 4))


@pytest.mark.parametrize("kind", [lambda data: data, lambda data: SimpleNamespace(**vars(data))])
def test_a_batch_of_graphs_is_checked_as_a_whole(kind: Any) -> None:
    torch.manual_seed(0)
    data, policy = kind(graphs()), MessagePassing()
    before = {name: each.clone() for name, each in vars(data).items() if isinstance(each, Tensor)}
    report = check_policy(policy, data)
    assert report.passed, str(report)
    undecided = [each.check for each in report.findings if each.verdict is Verdict.UNDECIDED]
    assert undecided == ["rows", "finite"]
    assert all(torch.equal(getattr(data, name), each) for name, each in before.items())
    assert_policy(
        lambda pair: policy(pair["graph"]), {"graph": data}, parameters=policy.parameters()
    )


def test_graphs_that_a_policy_writes_to_are_named() -> None:
    class Writing(MessagePassing):
        def forward(self, data: Any) -> Distribution:
            data.x.clamp_(-1, 1)
            return super().forward(data)

    torch.manual_seed(0)
    report = check_policy(Writing(), graphs())
    assert "changes observations.x" in report["state"].cause


def test_one_graph_alone_is_refused() -> None:
    (failure,) = check_policy(MessagePassing(), graphs(1)).failures
    assert re.search(r"batch shape \(1,\).*at least two rows", failure.cause)


class WithValue(Policy):
    """An actor and a critic in one."""

    def forward(self, seen: Tensor) -> Any:
        return super().forward(seen), self.body(seen).mean(-1)


class Bare(Distribution):
    """A Gaussian whose class does not call ``super().__init__``."""

    arg_constraints = {}  # noqa: RUF012  # torch declares it so

    def __init__(self, mean: Tensor, std: Tensor) -> None:
        self.normal = Independent(Normal(mean, std), 1)

    def sample(self, sample_shape: Any = ()) -> Tensor:
        result: Tensor = self.normal.sample(sample_shape)
        return result

    def log_prob(self, value: Tensor) -> Tensor:
        result: Tensor = self.normal.log_prob(value)
        return result


class OfBare(Policy):
    """A dict of one of these."""

    def dist(self, mean: Tensor, std: Tensor) -> Any:
        return {"stick": Bare(mean, std)}


class Failing(Independent):  # type: ignore[type-arg]  # not generic in old releases
    """A distribution whose log_prob raises."""

    def log_prob(self, value: Tensor) -> Tensor:
        raise KeyError("no density")


class OfFailing(Policy):
    """A policy of one of these."""

    def dist(self, mean: Tensor, std: Tensor) -> Any:
        return Failing(Normal(mean, std), 1)


@pytest.mark.parametrize(
    ("policy", "says"),
    [
        (WithValue, r"policy is Tensor.*part \[1\] of what the policy returns: leave it out"),
        (OfBare, r"Bare has no batch_shape and event_shape.*super\(\).__init__\(batch_shape"),
        (OfFailing, "KeyError: 'no density'"),
    ],
)
def test_what_is_wrong_with_what_a_policy_returns_is_told_once(policy: Any, says: str) -> None:
    torch.manual_seed(0)
    report = check_policy(policy(), torch.randn(ROWS, OBSERVATIONS))
    (failure,) = report.failures
    assert re.search(says, failure.cause)
