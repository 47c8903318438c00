"""Several batches as one, so that one evaluation serves them all."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby
from operator import itemgetter
from typing import Any

import torch
from torch import Tensor

from trpo_optim.distributions.nesting import mapped
from trpo_optim.rollouts.given_batches import Given

__all__ = ["Joined", "joined"]


@dataclass(frozen=True)
class Joined:
    """The trajectories of one or more batches, and what is given for their rows.

    Without a recurrent state, several batches are one row of shape (1, B), their valid rows. With a
    state, their environments stand side by side; shorter batches are padded by rows that are not
    valid.

    Attributes:
        observations: Shape (T, N, …).
        actions: Shape (T, N, …).
        info: Shape (T, N, …) by name.
        starts: Shape (T, N).
        valid: Shape (T, N).
        state: The recurrent state before the first row, or None.
        advantages: Shape (T, N).
        weights: Importance weights of the states, (T, N), or None.
        sampling_log_prob: ln q(a|s) of what drew the actions, (T, N). None: the old policy did.
        drawn_log_prob: ln π(a|s) of a single batch when its actions were drawn, (T, N). None: not
            known, or ``sampling_log_prob`` says what drew them.
        batch_weights: The weight of each row's batch, (T, N). None: all are 1.
        batches: The places of the batches in the list that was given.
        runs: How many rows (or environments with valid rows) in turn have one weight, and which.
    """

    observations: Any
    actions: Any
    info: dict[str, Any]
    starts: Tensor
    valid: Tensor
    state: Any
    advantages: Tensor
    weights: Tensor | None
    sampling_log_prob: Tensor | None
    drawn_log_prob: Tensor | None
    batch_weights: Tensor | None
    batches: tuple[int, ...]
    runs: list[tuple[int, float]]


def joined(given: Sequence[Given]) -> Joined:
    """Return batches as one.

    Args:
        given: The batches, checked. They have the same form.
    """
    batches = [each.batch for each in given]
    recurrent = batches[0].state is not None
    steps = max(len(batch.valid) for batch in batches)

    def rows(*values: Tensor, repeat: bool = True) -> Tensor:
        """Join tensors of shape (T, N, …)."""
        if len(values) == 1:
            return values[0]
        if recurrent:
            return torch.cat([_lengthened(each, steps, repeat=repeat) for each in values], 1)
        pairs = zip(values, batches, strict=True)
        return torch.cat([each[batch.valid] for each, batch in pairs])[None]

    def optional(values: Sequence[Tensor | None]) -> Tensor | None:
        """Join what some batches may lack, which then have ones."""
        if all(each is None for each in values):
            return None
        pairs = zip(values, given, strict=True)
        return rows(*(torch.ones_like(own.advantages) if v is None else v for v, own in pairs))

    units = [int((batch.valid.any(0) if recurrent else batch.valid).sum()) for batch in batches]
    weighed = [(count, each.weight) for count, each in zip(units, given, strict=True)]
    runs = [
        (sum(count for count, _ in run), weight) for weight, run in groupby(weighed, itemgetter(1))
    ]
    advantages = [each.advantages.to(torch.result_type(each.advantages, 1.0)) for each in given]
    weights = [
        torch.full_like(own, each.weight, dtype=torch.promote_types(own.dtype, torch.float32))
        for own, each in zip(advantages, given, strict=True)
    ]
    state = batches[0].state
    if recurrent and len(batches) > 1:
        state = mapped(lambda *each: torch.cat(each, 1), *(batch.state for batch in batches))
    return Joined(
        observations=mapped(rows, *(batch.observations for batch in batches)),
        actions=mapped(rows, *(batch.actions for batch in batches)),
        info=mapped(rows, *(batch.info for batch in batches)),
        starts=rows(*(batch.starts for batch in batches), repeat=False),
        valid=rows(*(batch.valid for batch in batches), repeat=False),
        state=state,
        advantages=rows(*advantages),
        weights=optional([each.weights for each in given]),
        sampling_log_prob=optional([each.sampling_log_prob for each in given]),
        drawn_log_prob=batches[0].log_prob if given[0].sampling_log_prob is None else None,
        batch_weights=None if all(weight == 1 for _, weight in runs) else rows(*weights),
        batches=tuple(each.index or 0 for each in given),
        runs=runs,
    )


def _lengthened(values: Tensor, steps: int, *, repeat: bool) -> Tensor:
    """Return a tensor with as many steps, the further ones like the last, or zero."""
    last = values[-1:] if repeat else torch.zeros_like(values[-1:])
    return torch.cat([values, last.expand(steps - len(values), *values.shape[1:])])
