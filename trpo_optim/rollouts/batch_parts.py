"""Parts of a batch: what a policy is evaluated on at once, and what is known of its rows."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from trpo_optim.distributions.nesting import mapped
from trpo_optim.rollouts.joined_batches import Joined
from trpo_optim.rollouts.spaces import evaluated

__all__ = ["Part", "parts_of"]


@dataclass(frozen=True)
class Part:
    """Some rows of a batch.

    Attributes:
        evaluate: Returns the policy's distribution there.
        actions: What was drawn.
        mask: Which elements of the distribution's batch are rows; None: all.
        numbers: From (T, N) to the rows', (B,).
        count: B.
    """

    evaluate: Callable[[], Any]
    actions: Any
    mask: Tensor | None
    numbers: Callable[[Tensor], Tensor]
    count: int

    def rows(self, values: Tensor) -> Tensor:
        """Return the rows of what has the distribution's batch shape."""
        return values if self.mask is None else values[self.mask]


def parts_of(policy: Callable[..., Any], joined: Joined) -> Callable[[Tensor], Part]:
    """Return what selects a part by the numbers of its rows.

    With a recurrent state these are the numbers of environments, of those with valid rows.

    Args:
        policy: The policy.
        joined: The batches.
    """
    return (_rows if joined.state is None else _sequences)(policy, joined)


def _rows(policy: Callable[..., Any], joined: Joined) -> Callable[[Tensor], Part]:
    """Return what selects from the valid rows."""
    valid = joined.valid
    observations, actions, entries = mapped(
        lambda each: each[valid], (joined.observations, joined.actions, joined.info)
    )
    count = int(valid.sum())

    def select(chosen: Tensor) -> Part:
        rows = slice(None) if len(chosen) == count else chosen.to(valid.device)
        seen, said = mapped(lambda each: each[rows], (observations, entries))
        return Part(
            evaluate=lambda: evaluated(policy, seen, info=said),
            actions=mapped(lambda each: each[rows], actions),
            mask=None,
            numbers=lambda values: values[valid][rows],
            count=len(chosen),
        )

    return select


def _sequences(policy: Callable[..., Any], joined: Joined) -> Callable[[Tensor], Part]:
    """Return what selects from the environments with valid rows."""
    used = joined.valid.any(0).nonzero().reshape(-1)

    def select(chosen: Tensor) -> Part:
        columns = used[chosen.to(used.device)]

        def of_columns(values: Any) -> Any:
            return mapped(lambda each: each[:, columns], values)

        seen, state = of_columns(joined.observations), of_columns(joined.state)
        said = of_columns(joined.info)
        starts, mask = joined.starts[:, columns], joined.valid[:, columns]
        return Part(
            evaluate=lambda: evaluated(policy, seen, state, starts, info=said)[0],
            actions=of_columns(joined.actions),
            mask=mask,
            numbers=lambda values: values[:, columns][mask],
            count=int(mask.sum()),
        )

    return select
