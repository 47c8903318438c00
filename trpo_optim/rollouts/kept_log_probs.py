"""The log-probabilities of what a rollout draws, many steps in one evaluation."""

from __future__ import annotations

import warnings
from typing import Any

import torch
from torch import Tensor
from torch.distributions import Bernoulli, Beta, Categorical, Independent, Normal

from trpo_optim.distributions import log_prob
from trpo_optim.distributions.nesting import mapped
from trpo_optim.distributions.precision import widened

__all__ = ["KeptLogProbs", "warn_if_moved"]

_PARAMETERS = {
    Beta: ("concentration1", "concentration0"),
    Bernoulli: ("logits",),
    Categorical: ("logits",),
    Normal: ("loc", "scale"),
}
"""What the log-probability of a family depends on, one row per element of the batch."""

_MOVED = 3e-3
"""Nats: a third of the KL of a usual step, and more than what rounding makes in half precision."""

_ENOUGH = 32
"""Actions that tell whether a policy has moved."""

_AT_ONCE = 64
"""How many steps wait to be evaluated together. Alone, each of them takes torch 0.1 ms."""


class KeptLogProbs:
    """ln π(a|s) of the actions of a rollout, as ``policy_closure`` computes it.

    A policy may sample what it has no density of. That must not end a rollout, so then there are no
    log-probabilities, from that step on.

    Args:
        recurrent: Whether a step's distribution has batch shape (1, N). Otherwise it has (N,).
    """

    def __init__(self, *, recurrent: bool) -> None:
        self._recurrent = recurrent
        self._known = True
        self._done: list[Tensor] = []
        self._waiting: list[tuple[list[Tensor], Any]] = []
        self._like: Any = None
        self._form = ""

    def add(self, dist: Any, actions: Any) -> None:
        """Note a step.

        Args:
            dist: What the policy returned.
            actions: What was drawn.
        """
        if not self._known:
            return
        try:
            parameters, form = _parameters(dist), repr(mapped(_form, dist))
            if parameters is None or form != self._form:
                self._evaluate_waiting()
            if parameters is None:
                self._evaluate(dist, actions, 1)
            else:
                self._like, self._form = dist, form
                self._waiting.append((parameters, actions))
                if len(self._waiting) == _AT_ONCE:
                    self._evaluate_waiting()
        except Exception:  # whatever a policy's own classes raise
            self._known = False

    def steps(self) -> Tensor | None:
        """Return the log-probabilities of all steps, (T, N), or None."""
        try:
            self._evaluate_waiting()
        except Exception:
            self._known = False
        return torch.cat(self._done) if self._known and self._done else None

    def _evaluate_waiting(self) -> None:
        """Evaluate the steps that wait."""
        if self._waiting:
            every, actions = zip(*self._waiting, strict=True)
            joined = map(torch.cat, zip(*every, strict=True))
            dist = mapped(lambda part: _with_parameters(part, joined), self._like)
            together = mapped(lambda *each: torch.cat(each), *actions)
            self._evaluate(dist, together, len(self._waiting))
            self._waiting.clear()

    def _evaluate(self, dist: Any, actions: Any, steps: int) -> None:
        """Evaluate steps that are joined along the first dimension of the batch."""
        first: list[Tensor] = []
        mapped(first.append, actions)
        mask = None
        if self._recurrent:
            mask = torch.ones(first[0].shape[:2], dtype=torch.bool, device=first[0].device)
        logs = log_prob(dist, actions, mask)
        rows = len(first[0]) if mask is None else mask.numel()
        if logs.shape != ((rows,) if mask is None else mask.shape):
            self._known = False
        else:
            self._done.append(logs.reshape(steps, rows // steps))


def warn_if_moved(drawn: Tensor, now: Tensor) -> None:
    """Warn if a policy that is taken for the one that drew some actions is another by now.

    Args:
        drawn: ln π(a|s) when the actions were drawn, (B,).
        now: The same under the present policy, (B,).
    """
    change = (now - drawn).cpu().double()
    kl = float((change.expm1() - change).mean())
    if kl > _MOVED and len(change) >= _ENOUGH:
        warnings.warn(
            "The policy is not the one that drew the actions of the batch: the KL between them is "
            f"about {kl:.2g} nats. The gradient is then biased. For a further step on one batch, "
            "pass lists, which correct for it: policy_closure(policy, [batch], [advantages]). If "
            "the policy has not moved, look for batch normalisation in training mode.",
            stacklevel=2,
        )


def _parameters(dist: Any) -> list[Tensor] | None:
    """Return copies of all parameters of a policy, or None if a family is not in the table.

    Copies, since a policy may write its next output to the same memory.
    """
    found: list[Tensor] = []
    parts: list[Any] = []
    mapped(parts.append, dist)
    for part in parts:
        inner = part
        while type(inner) is Independent:
            inner = inner.base_dist
        if type(inner) not in _PARAMETERS:
            return None
        found.extend(getattr(inner, name).clone() for name in _PARAMETERS[type(inner)])
    return found


def _form(dist: Any) -> list[Any]:
    """Return the families that a distribution is made of, and how many dimensions an action has."""
    if type(dist) is Independent:
        return [dist.reinterpreted_batch_ndims, *_form(dist.base_dist)]
    return [type(dist)]


def _with_parameters(dist: Any, parameters: Any) -> Any:
    """Return a distribution of the same family with the next parameters of an iterator."""
    if type(dist) is Independent:
        inner = _with_parameters(dist.base_dist, parameters)
        return Independent(inner, dist.reinterpreted_batch_ndims, validate_args=False)
    family: Any = type(dist)
    named = {name: widened(next(parameters), torch.float32) for name in _PARAMETERS[family]}
    return family(**named, validate_args=False)
