"""Checks of what evaluating a policy does and depends on."""

from __future__ import annotations

import copy
import math
import textwrap
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from trpo_optim.curvature.autograd_graph import graph_leaves
from trpo_optim.distributions import log_prob
from trpo_optim.distributions.nesting import mapped
from trpo_optim.distributions.parts import leaves
from trpo_optim.testing.findings import Finding, Verdict
from trpo_optim.testing.observations import parts, select
from trpo_optim.testing.subject import Subject

__all__ = [
    "check_determinism",
    "check_finite",
    "check_parameters",
    "check_rows",
    "check_state",
]

_SAME = 1e-4
"""Nats by which log-probabilities may differ through the order of operations."""


def check_determinism(subject: Subject) -> Finding:
    """Two evaluations at the same observations give the same policy."""
    name = "deterministic"
    first, second = (log_prob(subject.raw(subject.observations), subject.actions) for _ in range(2))
    gap = _gap(first, second)
    if gap <= _tolerance(first):
        return Finding(name, Verdict.PASSED, {"gap": gap})
    return Finding(
        name,
        Verdict.FAILED,
        {"gap": gap},
        f"Two evaluations at the same observations differ by {gap:.3g} nats in log_prob: the "
        "policy draws random numbers (dropout, noise) or moves its own state.",
        "Use policy.eval() for rollouts and updates, or put the random state back between the old "
        "distribution and step().",
    )


def check_state(subject: Subject) -> Finding:
    """Evaluating moves no parameter, buffer, observation or training flag."""
    name = "state"
    observations = mapped(Tensor.clone, subject.observations)
    before = copy.deepcopy(list(_state(subject, observations)))
    with torch.no_grad():
        subject.policy(observations)
    moved = [
        label
        for (label, was), (_, now) in zip(before, _state(subject, observations), strict=True)
        if not _equal(was, now)
    ]
    if not moved:
        return Finding(name, Verdict.PASSED, {"tensors": float(len(before))})
    return Finding(
        name,
        Verdict.FAILED,
        {"moved": float(len(moved))},
        f"One evaluation changes {', '.join(moved[:4])}: the policy after the rollout is not the "
        "one that acted.",
        "Update statistics outside forward, use eval() for normalisation layers, and write to no "
        "tensor in place.",
    )


def _state(subject: Subject, observations: Any) -> Iterator[tuple[str, Any]]:
    yield from parts(observations, "observations")
    if subject.module is not None:
        yield from subject.module.named_parameters()
        yield from subject.module.named_buffers()
        yield "training mode", [each.training for each in subject.module.modules()]
    else:
        yield from ((f"parameter {index}", each) for index, each in enumerate(subject.parameters))


def _equal(was: Any, now: Any) -> bool:
    if isinstance(was, Tensor):
        return torch.equal(was.nan_to_num(), now.nan_to_num())
    return bool(was == now)


def check_rows(subject: Subject) -> Finding:
    """The distribution at one observation does not depend on the others in the batch."""
    name = "rows"
    whole = subject.old_log_prob
    places = torch.arange(subject.rows)
    gap = 0.0
    for rows in (places.flip(0), places[: max(1, subject.rows // 3)], places[:1]):
        dist = subject.dist(select(subject.observations, rows))
        sound = all(leaf.batch_shape[:1] == (len(rows),) for leaf in leaves(dist))
        part = log_prob(dist, select(subject.actions, rows))
        gap = max(gap, _gap(part, whole[rows.to(whole.device)])) if sound else math.inf
        if not gap <= _tolerance(whole):
            break
    if gap <= _tolerance(whole):
        return Finding(name, Verdict.PASSED, {"gap": gap})
    return Finding(
        name,
        Verdict.FAILED,
        {"gap": gap},
        f"log_prob of a row changes by {gap:.3g} nats with the other rows of the batch: something "
        "goes across the batch (batch normalisation in training mode, a mean or softmax over the "
        "wrong dimension, squeeze() of a single row), so that acting and updating see different "
        "policies.",
        "Use eval() for batch normalisation, or another one, and give every reduction and squeeze "
        "its dim.",
    )


def check_parameters(subject: Subject) -> Finding:
    """Autograd reaches every parameter that the policy depends on."""
    name = "parameters"
    reached = set(map(id, subject.reached))
    names = _names(subject)
    left = [each for each in subject.parameters if id(each) not in reached]
    detached = [names[id(each)] for each in left if _matters(subject, each)]
    figures = {"reached": float(len(reached)), "unused": float(len(left) - len(detached))}
    unused = [names[id(each)] for each in left if names[id(each)] not in detached]
    strangers = _strangers(subject)
    if strangers:
        return Finding(
            name,
            Verdict.FAILED,
            figures,
            f"The policy depends on {strangers} tensors that require gradients and are not among "
            "its parameters: the optimizer would never move them.",
            "Keep layers in nn.ModuleList, not in a list, and tensors as nn.Parameter.",
        )
    if detached:
        return Finding(
            name,
            Verdict.FAILED,
            figures,
            f"The policy depends on {', '.join(detached[:4])}, and autograd does not reach it: it "
            "is detached on the way.",
            "Drop detach(), .data, .item() or no_grad() between that parameter and the "
            "distribution.",
        )
    if not reached:
        return Finding(
            name,
            Verdict.FAILED,
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
    value = log_prob(subject.dist(), subject.actions)
    return len({id(leaf) for leaf in graph_leaves(value)} - known)


def _names(subject: Subject) -> dict[int, str]:
    named = {} if subject.module is None else dict(subject.module.named_parameters())
    names = {id(each): f"parameter {index}" for index, each in enumerate(subject.parameters)}
    return names | {id(each): name for name, each in named.items()}


def _matters(subject: Subject, parameter: Tensor) -> bool:
    """Return whether moving a parameter moves the distribution."""
    content = parameter.detach().clone()
    with torch.no_grad():
        try:
            parameter.add_(
                0.1 * torch.randn_like(parameter) * max(1.0, float(content.std(correction=0)))
            )
            moved = log_prob(subject.dist(), subject.actions)
        except (RuntimeError, ValueError):
            return True
        finally:
            parameter.copy_(content)
    return _gap(moved, subject.old_log_prob) > _tolerance(moved)


def check_finite(subject: Subject) -> Finding:
    """Log-probabilities and their gradient are numbers over the range of the observations."""
    name = "finite"
    for label, observations in _corners(subject.observations):
        cause = ""
        try:
            value = log_prob(subject.dist(observations), subject.actions)
            slopes = torch.autograd.grad(value.sum(), subject.parameters, allow_unused=True)
            if not value.isfinite().all():
                cause = "log_prob is not finite"
            elif not all(each.isfinite().all() for each in slopes if each is not None):
                cause = "the gradient of log_prob is not finite"
        except ValueError as error:
            cause = textwrap.shorten(f"the distribution cannot be made: {error}", 120)
        if cause:
            return Finding(
                name,
                Verdict.FAILED,
                {},
                f"At {label}: {cause}.",
                "Bound what goes into exp, log and division: clamp log_std, softplus for scales, "
                "normalised observations.",
            )
    return Finding(name, Verdict.PASSED)


def _corners(observations: Any) -> Iterator[tuple[str, Any]]:
    """Yield observations at the edges of the range that was given, and zeros.

    What is 0 or 1 throughout stays: masks and one-hot codes hold together.
    """

    def numbers(value: Tensor) -> Tensor:
        return ~((value == 0) | (value == 1)).all(0) & value.is_floating_point()

    def zeros(value: Tensor) -> Tensor:
        return value.masked_fill(numbers(value), 0)

    def corners(value: Tensor) -> Tensor:
        low = torch.rand(value.shape).to(value.device) < 0.5
        edges = torch.where(low, value.amin(0), value.amax(0))
        return torch.where(numbers(value), edges, value)

    yield "observations of zeros", mapped(zeros, observations)
    yield "corners of the observations' range", mapped(corners, observations)


def _gap(left: Tensor, right: Tensor) -> float:
    same = left.shape == right.shape
    return float((left - right).detach().abs().max()) if same else math.inf


def _tolerance(log_probs: Tensor) -> float:
    finest = torch.finfo(log_probs.dtype).eps
    return max(_SAME * (finest > 1e-10), 1e4 * finest) * max(
        1.0, float(log_probs.detach().abs().max()) / 10
    )
