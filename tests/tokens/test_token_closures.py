"""The closures on tokens beside handwritten ones, in whole and in micro-batches."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from devices import each_device
from language_model import VOCABULARY, Rollout, both, derivatives, evaluated
from torch import Tensor, nn
from torch.distributions import Categorical, kl_divergence

from trpo_optim import Closures, TrustRegionError, TrustRegionOptimizer
from trpo_optim.testing import assert_closure
from trpo_optim.tokens import group_advantages, token_closures

pytestmark = pytest.mark.usefixtures("flat_policies_pass")

OLD = ["log_prob", "logits", 3]

each_old = pytest.mark.parametrize("old", OLD)
each_per = pytest.mark.parametrize("per", ["token", "sequence"])


def closures_of(rollout: Rollout, **options: Any) -> Closures:
    return token_closures(
        rollout.logits, rollout.tokens, rollout.mask, rollout.advantages, **options
    )


@each_per
@each_old
@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_loss_and_kl_are_those_written_by_hand(old: Any, per: Any, temperature: float) -> None:
    rollout = Rollout()
    behaviour, reference = -torch.rand(2, *rollout.tokens.shape, dtype=torch.float64) - 1
    closures = closures_of(
        rollout,
        old=old,
        per=per,
        temperature=temperature,
        behaviour_log_prob=behaviour,
        reference_log_prob=reference,
        reference_weight=0.3,
    )
    old_logs, old_log_prob = rollout.logs(temperature).detach(), rollout.log_prob(temperature)
    rollout.move()
    logs, log_prob = rollout.logs(temperature), rollout.log_prob(temperature)
    ratio, rho = (log_prob - behaviour).exp(), (reference - log_prob).exp()
    penalty = ratio * (rho - 1 - rho.log())
    loss = rollout.mean(-ratio * rollout.advantages[:, None] + 0.3 * penalty, per)
    if old == "log_prob":
        r = (log_prob - old_log_prob.detach()).exp()
        kls = (old_log_prob.detach() - behaviour).exp() * (r - 1 - r.log())
    elif old == "logits":
        kls = kl_divergence(Categorical(logits=old_logs), Categorical(logits=logs))
    else:
        kls = coarse_kl(old_logs, logs, old)
    ours = both(rollout, closures)
    torch.testing.assert_close(ours[0], derivatives(loss, rollout.parameters), rtol=0, atol=1e-12)
    kl = derivatives(rollout.mean(kls, per), rollout.parameters)
    torch.testing.assert_close(ours[1], kl, rtol=0, atol=1e-12)


def coarse_kl(old: Tensor, new: Tensor, k: int) -> Tensor:
    """Return the KL between the old policy's k likeliest tokens and all others together."""
    order = old.sort(-1, descending=True).indices
    old, new = (each.exp().gather(-1, order) for each in (old, new))
    old, new = (
        torch.cat([each[..., :k], each[..., k:].sum(-1, keepdim=True)], -1) for each in (old, new)
    )
    return (old * (old / new).log()).sum(-1)


@each_per
@each_old
@pytest.mark.parametrize("micro_batch", [1, 4])
def test_micro_batches_have_the_mean_of_the_whole_batch(
    old: Any, per: Any, micro_batch: int
) -> None:
    rollout = Rollout()
    options = {"old": old, "per": per, "behaviour_log_prob": rollout.log_prob().detach() + 0.1}
    whole = closures_of(rollout, **options)
    parts = closures_of(rollout, micro_batch=micro_batch, **options)
    assert len(parts.parts) == math.ceil(9 / micro_batch)  # one of ten has no token that counts
    rollout.move()
    for ours, expected in zip(both(rollout, parts), both(rollout, whole), strict=True):
        torch.testing.assert_close(ours, expected, rtol=0, atol=1e-12)


@each_per
@each_old
@pytest.mark.parametrize("micro_batch", [None, 4])
def test_a_step_is_that_of_a_closure_written_by_hand(
    old: Any, per: Any, micro_batch: int | None
) -> None:
    """Gauss-Newton on the third value beside torch.func on a closure without one."""
    rollout = Rollout()
    start, old_logs = rollout.log_prob().detach(), rollout.logs().detach()

    def by_hand() -> tuple[Tensor, Tensor]:
        log_ratio = rollout.log_prob() - start
        if old == "log_prob":
            kls = log_ratio.exp() - 1 - log_ratio
        elif old == "logits":
            kls = kl_divergence(Categorical(logits=old_logs), Categorical(logits=rollout.logs()))
        else:
            kls = coarse_kl(old_logs, rollout.logs(), old)
        gain = rollout.mean(log_ratio.exp() * rollout.advantages[:, None], per)
        return -gain, rollout.mean(kls, per)

    closures = closures_of(rollout, old=old, per=per, micro_batch=micro_batch)
    ends = []
    pairs: list[tuple[Any, Any]] = [(by_hand, "torch.func"), (closures, "Gauss-Newton")]
    for closure, engine in pairs:
        before = [each.detach().clone() for each in rollout.parameters]
        optimizer = TrustRegionOptimizer(rollout.parameters, engine=engine)
        report = optimizer.step(closure)
        assert (report.accepted, report.engine) == (True, engine)
        assert 0.009 < report.kl <= 0.01
        ends.append(torch.cat([each.detach().flatten() for each in rollout.parameters]))
        with torch.no_grad():
            for each, value in zip(rollout.parameters, before, strict=True):
                each.copy_(value)
    torch.testing.assert_close(ends[1], ends[0], rtol=0, atol=1e-8)


@each_device
@each_old
def test_the_third_value_serves_the_products_unnamed(old: Any, device: str) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Embedding(VOCABULARY, 6), nn.Tanh(), nn.Linear(6, VOCABULARY))
    model.to(device)
    tokens = torch.randint(VOCABULARY, (8, 6)).to(device)
    advantages = group_advantages(torch.randn(8, device=device), 4)
    closures = token_closures(
        lambda rows: model(tokens[rows])[:, :-1],
        tokens[:, 1:],
        tokens[:, 1:] > 0,
        advantages,
        old=old,
        curvature=0.5,
    )
    report = TrustRegionOptimizer(model.parameters()).step(closures)
    assert (report.accepted, report.engine) == (True, "Gauss-Newton"), report.fallback


@each_old
def test_several_steps_on_one_rollout_start_at_the_present_policy(old: Any) -> None:
    rollout = Rollout()
    behaviour = rollout.log_prob().detach()
    optimizer = TrustRegionOptimizer(rollout.parameters, engine="Gauss-Newton")
    for _ in range(3):
        present = rollout.log_prob().detach()
        closures = closures_of(rollout, old=old, behaviour_log_prob=behaviour)
        loss, kl, _ = evaluated(closures)
        expected = -rollout.mean((present - behaviour).exp() * rollout.advantages[:, None], "token")
        assert loss.item() == pytest.approx(expected.item(), abs=1e-12)
        assert kl.item() == pytest.approx(0, abs=1e-14)
        report = optimizer.step(closures)
        assert report.accepted
        assert 0 < report.kl <= 0.01
    assert not torch.allclose(present, behaviour, atol=1e-2)


@pytest.mark.parametrize(("share", "rows"), [(1 / 3, [0, 3, 7]), (0.01, [0]), (1.0, None)])
def test_products_are_taken_on_evenly_spaced_sequences_that_count(
    share: float, rows: list[int] | None
) -> None:
    rollout = Rollout()
    seen: list[Any] = []

    def logits(chosen: Any) -> Tensor:
        seen.append(chosen)
        return rollout.logits(chosen)

    closures = token_closures(
        logits, rollout.tokens, rollout.mask, rollout.advantages, curvature=share, micro_batch=4
    )
    if rows is None:
        assert closures.curvature is None
        return
    seen.clear()
    assert closures.curvature is not None
    closures.curvature()
    assert seen[0].tolist() == rows


def test_sequences_without_a_token_that_counts_are_never_evaluated() -> None:
    rollout = Rollout()
    seen: list[int] = []

    def logits(rows: Tensor) -> Tensor:
        seen.extend(rows.tolist())
        return rollout.logits(rows)

    token_closures(logits, rollout.tokens, rollout.mask, rollout.advantages)()
    assert set(seen) == {*range(10)} - {5}


@each_old
def test_padding_may_hold_anything(old: Any) -> None:
    rollout = Rollout()
    plain = both(rollout, closures_of(rollout, old=old))
    tokens, mask = rollout.tokens.masked_fill(~rollout.mask, -100), rollout.mask
    nothing = torch.full(tokens.shape, math.nan, dtype=torch.float64)
    of_tokens = rollout.advantages[:, None].where(mask, nothing)
    behaviour = rollout.log_prob().detach().where(mask, nothing)

    def logits(rows: Any) -> Tensor:
        return rollout.logits(rows).masked_fill(~mask[rows][..., None], math.nan)

    closures = token_closures(
        logits, tokens, mask.long(), of_tokens, old=old, behaviour_log_prob=behaviour
    )
    for ours, expected in zip(both(rollout, closures), plain, strict=True):
        torch.testing.assert_close(ours, expected, rtol=0, atol=1e-12)


@each_per
@each_old
def test_the_packages_own_checks_find_nothing(old: Any, per: Any) -> None:
    rollout = Rollout()
    assert_closure(
        closures_of(rollout, old=old, per=per),
        rollout.parameters,
        log_prob=rollout.log_prob,
        advantages=rollout.advantages,
        mask=rollout.mask,
    )


def test_the_largest_kl_needs_the_logits_and_its_error_says_so() -> None:
    rollout = Rollout()
    optimizer = TrustRegionOptimizer(rollout.parameters, constraint="max")
    with pytest.raises(TrustRegionError, match=r"constraint is 'max'.*pass old='logits'"):
        optimizer.step(closures_of(rollout))
    report = optimizer.step(closures_of(rollout, old="logits"))
    assert 0 < report.kl < report.largest_kl <= 0.01


@pytest.mark.parametrize("weight", [0, 0.0])
def test_a_weight_of_0_leaves_the_penalty_out(weight: float) -> None:
    rollout = Rollout()
    plain = both(rollout, closures_of(rollout))
    nothing = torch.full(rollout.tokens.shape, math.nan, dtype=torch.float64)
    penalty = {"reference_log_prob": nothing, "reference_weight": weight}
    for ours, expected in zip(both(rollout, closures_of(rollout, **penalty)), plain, strict=True):
        torch.testing.assert_close(ours, expected, rtol=0, atol=0)
    closures_of(rollout, reference_weight=weight)
