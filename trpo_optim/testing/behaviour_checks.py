"""Checks of what evaluating a policy does and depends on."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from trpo_optim.curvature.autograd_graph import graph_leaves
from trpo_optim.distributions.parts import leaves
from trpo_optim.errors import TrustRegionError
from trpo_optim.testing.directions import nudges
from trpo_optim.testing.findings import Finding, Verdict, failed, undecided
from trpo_optim.testing.observations import are_rows, select
from trpo_optim.testing.subject import Subject

__all__ = [
    "check_determinism",
    "check_parameters",
    "check_rows",
]

_SAME = 1e-4
"""Nats by which log-probabilities may differ through the order of operations."""

_LIKELY = 8.0
"""How many times what is seen of the rounding of log_prob it may be elsewhere."""

_HIDDEN = 0.05
"""Nats of rounding that hide what goes across the batch."""


def check_determinism(subject: Subject) -> Finding:
    """Two evaluations at the same observations give the same policy."""
    name = "deterministic"
    first, second = (subject.log_prob(subject.raw(subject.observations)) for _ in range(2))
    gap = _gap(first, second)
    if gap <= _tolerance(first):
        return Finding(name, Verdict.PASSED, {"gap": gap})
    return failed(
        name,
        {"gap": gap},
        f"Two evaluations at the same observations differ by {gap:.3g} nats in log_prob: the "
        "policy draws random numbers (dropout, noise) or moves its own state.",
        "Use policy.eval() for rollouts and updates, or put the random state back between the old "
        "distribution and step().",
    )


def check_rows(subject: Subject) -> Finding:
    """The distribution at one observation does not depend on the others in the batch."""
    name = "rows"
    if not are_rows(subject.observations):
        kind = "The observations are an object, which the kit does not cut into rows."
        return undecided(name, kind)
    whole = subject.old_log_prob
    places = torch.arange(subject.rows, device="cpu")
    if _is_stale(subject):
        return failed(
            name,
            {},
            "The policy gives the same distributions for the rows of the batch in another order: "
            "it caches features of other observations, or does not look at these.",
            "Compute features in every forward, or forget them when observations change.",
        )
    gap, near, rounding = 0.0, _tolerance(whole), 0.0
    for rows in (places.flip(0), places[: max(1, subject.rows // 3)], places[:1]):
        dist = subject.dist(select(subject.observations, rows))
        if any(leaf.batch_shape[:1] != (len(rows),) for leaf in leaves(dist)):
            gap = math.inf
            break
        part = subject.log_prob(dist, select(subject.actions, rows))
        gap = max(gap, _gap(part, whole[rows.to(whole.device)]))
        if gap > near:
            rounding = rounding or _of_rounding(subject)
            if gap > rounding:
                break
    figures = {"gap": gap, "rounding": rounding} if rounding else {"gap": gap}
    if gap <= max(near, rounding):
        if rounding <= _HIDDEN:
            return Finding(name, Verdict.PASSED, figures)
        cause = f"Rounding may change log_prob of a row by up to {rounding:.3g} nats."
        remedy = "Check the policy in higher precision, or bound its scale from below."
        return Finding(name, Verdict.UNDECIDED, figures, cause, remedy)
    return failed(
        name,
        {"gap": gap},
        f"log_prob of a row changes by {gap:.3g} nats with the other rows of the batch: something "
        "goes across the batch (batch normalisation in training mode, a mean or softmax over the "
        "wrong dimension, squeeze() of a single row), so that acting and updating see different "
        "policies.",
        "Use eval() for batch normalisation, or another one, and give every reduction and squeeze "
        "its dim.",
    )


def _of_rounding(subject: Subject) -> float:
    """Return by how much rounding may change log_prob of a row.

    That is seen where every parameter moves to the next number: all that follows rounds otherwise.
    """
    widest = 0.0
    try:
        steps = list(nudges(subject))
    except (TrustRegionError, RuntimeError):  # no gradients, or no evaluation twice: another fault
        return 0.0
    for step in steps:
        with torch.no_grad(), subject.at(step):
            moved = subject.log_prob(subject.dist())
        widest = max(widest, _gap(moved, subject.old_log_prob))
    return _LIKELY * widest


def _is_stale(subject: Subject) -> bool:
    """Return whether observations in another order leave all as it was, though that matters."""
    whole = subject.old_log_prob
    order = torch.arange(subject.rows, device="cpu").flip(0)
    dist = subject.dist(select(subject.observations, order))
    if any(leaf.batch_shape[:1] != (subject.rows,) for leaf in leaves(dist)):
        return False
    near = _tolerance(whole)
    same = _gap(subject.log_prob(dist), whole) <= near
    turned = subject.log_prob(dist, select(subject.actions, order))
    return same and _gap(turned, whole[order.to(whole.device)]) > near


def check_parameters(subject: Subject) -> Finding:
    """Autograd reaches every parameter that the policy depends on."""
    name = "parameters"
    reached = set(map(id, subject.reached))
    names = subject.names()
    left = [each for each in subject.parameters if id(each) not in reached]
    detached = [names[id(each)] for each in left if _matters(subject, each)]
    figures = {"reached": float(len(reached)), "unused": float(len(left) - len(detached))}
    unused = [names[id(each)] for each in left if names[id(each)] not in detached]
    strangers = _strangers(subject)
    if strangers:
        return failed(
            name,
            figures,
            f"The policy depends on {strangers} tensors that require gradients and are not among "
            "its parameters: the optimizer would never move them.",
            "Keep layers in nn.ModuleList, not in a list, and tensors as nn.Parameter.",
        )
    if detached:
        return failed(
            name,
            figures,
            f"The policy depends on {', '.join(detached[:4])}, and autograd does not reach it: it "
            "is detached on the way.",
            "Drop detach(), .data, .item() or no_grad() between that parameter and the "
            "distribution.",
        )
    if not reached:
        return failed(
            name,
            figures,
            "Autograd reaches no parameter from log_prob.",
            "Compute the distribution from the module's parameters, with gradients enabled.",
        )
    told = f"Not used by the policy: {', '.join(unused)}." if unused else ""
    return Finding(name, Verdict.PASSED, figures, told)


def _strangers(subject: Subject) -> int:
    """Return how many leaves of the graph are not parameters of the module."""
    if subject.module is None:
        return 0
    known = set(map(id, subject.module.parameters())) | set(map(id, subject.parameters))
    value = subject.log_prob(subject.dist())
    return len({id(leaf) for leaf in graph_leaves(value)} - known)


def _matters(subject: Subject, parameter: Tensor) -> bool:
    """Return whether moving a parameter moves the distribution."""
    content = parameter.detach().clone()
    with torch.no_grad():
        try:
            parameter.add_(
                0.1 * torch.randn_like(parameter) * max(1.0, float(content.std(correction=0)))
            )
            moved = subject.log_prob(subject.dist())
        except (RuntimeError, ValueError):
            return True
        finally:
            parameter.copy_(content)
    return _gap(moved, subject.old_log_prob) > _tolerance(moved)


def _gap(left: Tensor, right: Tensor) -> float:
    if left.shape != right.shape:
        return math.inf
    gaps = torch.where(left == right, 0.0, left - right).detach().abs()
    return float(gaps.nan_to_num(math.inf, math.inf).max())


def _tolerance(log_probs: Tensor) -> float:
    finest = torch.finfo(log_probs.dtype).eps
    return max(_SAME * (finest > 1e-10), 1e4 * finest) * max(
        1.0, float(log_probs.detach().abs().max()) / 10
    )
