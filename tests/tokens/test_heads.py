"""Hidden states and a head, in place of logits."""

from __future__ import annotations

import weakref
from typing import Any

import pytest
import torch
from language_model import VOCABULARY, Rollout, both, kept_elements
from torch import Tensor

from trpo_optim import Closures, TrustRegionOptimizer
from trpo_optim.tokens import log_prob, token_closures

pytestmark = pytest.mark.usefixtures("flat_policies_pass")

each_old = pytest.mark.parametrize("old", ["log_prob", "logits", 3])
each_head = pytest.mark.parametrize("trained", [True, False], ids=["trained", "frozen"])


def posed(trained: bool) -> Rollout:
    """Return a rollout whose parameters are those that the optimizer moves."""
    rollout = Rollout()
    rollout.model.head.requires_grad_(trained)
    return rollout


def moved(rollout: Rollout) -> list[Tensor]:
    return [each for each in rollout.parameters if each.requires_grad]


def closures_of(rollout: Rollout, *, with_head: bool, **options: Any) -> Closures:
    def hidden(rows: Any) -> Tensor:
        return rollout.model.hidden(rollout.whole[rows][:, :-1])

    if with_head:
        options |= {"head": rollout.model.head, "chunk": 4}
    return token_closures(
        hidden if with_head else rollout.logits,
        *(rollout.tokens, rollout.mask, rollout.advantages),
        **options,
    )


@each_head
@each_old
@pytest.mark.parametrize("per", ["token", "sequence"])
@pytest.mark.parametrize("micro_batch", [None, 4])
def test_loss_and_kl_are_those_of_the_whole_logits(
    old: Any, trained: bool, per: Any, micro_batch: int | None
) -> None:
    rollout = posed(trained)
    options: dict[str, Any] = {"old": old, "per": per, "temperature": 0.7}
    whole = closures_of(rollout, with_head=False, **options)
    chunks = closures_of(rollout, with_head=True, micro_batch=micro_batch, **options)
    with torch.no_grad():
        for each in moved(rollout):
            each.add_(0.05 * torch.randn_like(each))
    rollout.model.head.requires_grad_()  # so that its gradients are compared, too
    for ours, theirs in zip(both(rollout, chunks), both(rollout, whole), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-12)


@each_head
@each_old
@pytest.mark.parametrize("engine", ["Gauss-Newton", "double backward", "auto"])
def test_a_step_is_that_of_the_whole_logits(old: Any, trained: bool, engine: Any) -> None:
    ends, reports = [], []
    for with_head in (False, True):
        rollout = posed(trained)
        optimizer = TrustRegionOptimizer(moved(rollout), engine=engine, cg_tolerance=0.0)
        reports.append(optimizer.step(closures_of(rollout, with_head=with_head, old=old)))
        ends.append(torch.cat([each.detach().flatten() for each in rollout.parameters]))
    assert reports[1].accepted, reports[1]
    if engine != "auto":
        torch.testing.assert_close(ends[1], ends[0], rtol=0, atol=1e-8)
        return
    assert reports[1].engine == "finite differences", reports[1].fallback
    start = torch.cat([each.detach().flatten() for each in posed(trained).parameters])
    ours, theirs = ends[1] - start, ends[0] - start
    assert torch.cosine_similarity(ours, theirs, 0) > 0.9999


@each_old
def test_a_graph_keeps_no_logits(old: Any) -> None:
    torch.manual_seed(0)
    head = torch.nn.Linear(4, 500)
    tokens, start = torch.randint(500, (4, 10)), torch.randn(4, 10, 4)
    weight = torch.ones((), requires_grad=True)
    closures = token_closures(
        lambda rows: weight * start[rows],
        *(tokens, None, torch.randn(4)),
        old=old,
        head=head,
        chunk=5,
    )
    assert kept_elements(closures.parts[0]) < 40 * 500


@each_head
@each_old
@pytest.mark.parametrize("grad", [True, False])
def test_few_chunks_of_logits_exist_at_once(old: Any, trained: bool, grad: bool) -> None:
    rollout = posed(trained)
    alive, most = 0, 0

    def head(hidden: Tensor) -> Tensor:
        nonlocal alive, most
        logits: Tensor = rollout.model.head(hidden)
        alive, most = alive + 1, max(most, alive + 1)
        weakref.finalize(logits, gone)
        return logits

    def gone() -> None:
        nonlocal alive
        alive -= 1

    closures = token_closures(
        lambda rows: rollout.model.hidden(rollout.whole[rows][:, :-1]),
        *(rollout.tokens, rollout.mask, rollout.advantages),
        old=old,
        head=head,
        chunk=4,
    )
    with torch.set_grad_enabled(grad):
        closures.parts[0]()
    assert most <= 2  # of the old and of the present policy


@each_head
@pytest.mark.parametrize("old", ["logits", 3])
@pytest.mark.parametrize("engine", ["Gauss-Newton", "double backward"])
def test_chunks_of_several_pieces_give_the_same_step(
    old: Any, trained: bool, engine: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    ends = []
    for most in (2**18, 2 * VOCABULARY):
        monkeypatch.setitem(log_prob._PIECE, "cpu", most)
        rollout = posed(trained)
        optimizer = TrustRegionOptimizer(moved(rollout), engine=engine)
        report = optimizer.step(closures_of(rollout, with_head=True, old=old))
        assert (report.accepted, report.engine) == (True, engine)
        ends.append(torch.cat([each.detach().flatten() for each in rollout.parameters]))
    torch.testing.assert_close(*ends, rtol=0, atol=1e-10)
