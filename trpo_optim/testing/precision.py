"""A policy in double precision, if it computes in that throughout."""

from __future__ import annotations

import copy

import torch

from trpo_optim.testing.subject import Subject

__all__ = ["in_double_precision"]


def in_double_precision(subject: Subject) -> Subject:
    """Return a policy in double precision, or where something in it is coarser, at least in single.

    Args:
        subject: The policy, which remembers the answer.
    """
    if subject.precise is None:
        found = _in(subject, torch.float64)
        if found is None and any(each.dtype is not torch.float32 for each in subject.parameters):
            found = _in(subject, torch.float32)
        subject.precise = found or subject
    return subject.precise


def _in(subject: Subject, dtype: torch.dtype) -> Subject | None:
    """Return a policy in another precision, or None where it does not work in that throughout."""
    if subject.module is None:
        return None
    names = {id(each): name for name, each in subject.module.named_parameters()}
    try:
        module = copy.deepcopy(subject.module).to(dtype)
        whole = subject.policy is subject.module
        policy = module if whole else getattr(module, subject.policy.__name__)
        named = dict(module.named_parameters())
        parameters = [named[names[id(each)]] for each in subject.parameters]
        other = subject.widened(policy, parameters, dtype)
        kl = other.kl(other.dist())
        works = {other.old_log_prob.dtype, kl.dtype} == {dtype}
        return other if works and (dtype is torch.float32 or _is_smooth(other)) else None
    except Exception:  # whatever a policy makes of that precision
        return None


def _is_smooth(subject: Subject) -> bool:
    """Return whether small moves forward and backward change log_prob by as much, but for sign.

    In a policy that computes in lower precision somewhere, they change it by rounding.
    """
    vector = subject.vector
    generator = torch.Generator("cpu").manual_seed(0)
    step = torch.randn(len(vector), generator=generator, device="cpu").to(vector.current())
    slope = subject.gradient((subject.log_prob(subject.dist()) * subject.advantages).mean())
    step *= 1e-9 * (1 + vector.current().abs()) * (slope != 0)
    changes = []
    for sign in (1.0, -1.0):
        with torch.no_grad(), subject.at(sign * step):
            changes.append(subject.log_prob(subject.dist()) - subject.old_log_prob)
    uneven = (changes[0] + changes[1]).norm()
    return bool(uneven <= 0.1 * (changes[0] - changes[1]).norm() + 1e-12)
