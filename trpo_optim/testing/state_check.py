"""The check that evaluating a policy changes nothing, and that the policy keeps no old values."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from trpo_optim.testing.attributes import Attributes
from trpo_optim.testing.findings import Finding, Verdict, failed
from trpo_optim.testing.observations import are_rows, changed, select, tensors_of
from trpo_optim.testing.subject import Subject

__all__ = ["check_state"]

_MOVING = (
    "gives another policy by them at the same observations: they are statistics, or a state of the "
    "policy, that move with every call"
)

_OF_OTHERS = "uses them at other observations: they are cached features, or statistics, of these"

_OF_PARAMETERS = (
    "uses them after the parameters have moved: they are cached features of older parameters"
)


def check_state(subject: Subject) -> Finding:
    """Evaluating moves no parameter, buffer, observation or training flag."""
    name = "state"
    observations = changed(Tensor.clone, subject.observations)
    kept = Attributes(subject.module)
    before = copy.deepcopy(list(_state(subject, observations)))
    with torch.no_grad():
        subject.policy(observations)
    moved = [
        label
        for (label, was), (_, now) in zip(before, _state(subject, observations), strict=True)
        if not _equal(was, now)
    ]
    if not moved:
        return _plain_attributes(subject, kept, {"tensors": float(len(before))})
    return failed(
        name,
        {"moved": float(len(moved))},
        f"One evaluation changes {', '.join(moved[:4])}: the policy after the rollout is not the "
        "one that acted.",
        "Update statistics outside forward, use eval() for normalisation layers, and write to no "
        "tensor in place.",
    )


def _state(subject: Subject, observations: Any) -> Iterator[tuple[str, Any]]:
    yield from tensors_of(observations, "observations")
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


def _plain_attributes(subject: Subject, before: Attributes, figures: dict[str, float]) -> Finding:
    """Return whether what an evaluation keeps in plain attributes changes the next ones."""
    name = "state"
    kept, after = before.changed(), Attributes(subject.module)
    for what, probe in _probes(subject) if kept else ():
        found = []
        for attributes in (before, after):
            attributes.restore()
            found.append(probe())
        before.restore()
        if not _agree(*found):
            names = ", ".join(kept[:4])
            return failed(
                name,
                {**figures, "kept": float(len(kept))},
                f"One evaluation changes {names}, kept as plain attributes, and the next one "
                f"{what}.",
                "Compute features in every forward, or forget them when observations or "
                "parameters change. Keep statistics as buffers (register_buffer), and update them "
                "outside forward.",
            )
    before.restore()
    return Finding(name, Verdict.PASSED, figures, _not_saved(subject.module, kept))


def _not_saved(module: nn.Module | None, kept: list[str]) -> str:
    """Return what is to be said of tensors that are neither parameters nor buffers."""
    names = [
        f"{prefix}.{name}" if prefix else name
        for prefix, each in ([] if module is None else module.named_modules())
        for name, value in vars(each).items()
        if isinstance(value, Tensor) and not value.requires_grad
    ]
    plain = ", ".join([name for name in names if name not in kept][:4])
    return (
        f"Plain tensors, which state_dict() and to() leave out: {plain}. Use register_buffer."
        if plain
        else ""
    )


def _probes(subject: Subject) -> Iterator[tuple[str, Callable[[], Tensor | None]]]:
    """Yield evaluations that must not depend on those before them, and what it means if so."""
    every = torch.arange(subject.rows, device="cpu")
    yield _MOVING, lambda: _log_prob(subject, None)
    if are_rows(subject.observations):
        yield _OF_OTHERS, lambda: _log_prob(subject, every.flip(0))
        yield _OF_OTHERS, lambda: _log_prob(subject, every[: len(every) // 2])
    yield _OF_PARAMETERS, lambda: _moved(subject)


def _log_prob(subject: Subject, rows: Tensor | None) -> Tensor | None:
    """Return log-probabilities of the actions, or None where the policy does not work."""
    try:
        if rows is None:
            return subject.log_prob(subject.dist()).detach()
        dist = subject.dist(select(subject.observations, rows))
        return subject.log_prob(dist, select(subject.actions, rows)).detach()
    except (RuntimeError, ValueError):
        return None


def _moved(subject: Subject) -> Tensor | None:
    """Return log-probabilities after a move of all parameters."""
    contents = [each.detach().clone() for each in subject.parameters]
    generator = torch.Generator("cpu").manual_seed(0)
    with torch.no_grad():
        try:
            for each in subject.parameters:
                size = max(1.0, float(each.std(correction=0)))
                each.add_(
                    0.1 * size * torch.randn(each.shape, generator=generator, device="cpu").to(each)
                )
            return _log_prob(subject, None)
        finally:
            for each, content in zip(subject.parameters, contents, strict=True):
                each.copy_(content)


def _agree(left: Tensor | None, right: Tensor | None) -> bool:
    if left is None or right is None:
        return left is right
    left, right = (each.nan_to_num() for each in (left, right))
    return left.shape == right.shape and torch.allclose(left, right, rtol=1e-6, atol=1e-7)
