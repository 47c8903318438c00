"""Advantages brought to mean 0 and standard deviation 1, over one process or over all ranks."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist
from torch import Tensor

from trpo_optim.errors import RankError

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

__all__ = ["failing_together", "standardised"]


@contextmanager
def failing_together(device: torch.device, group: ProcessGroup | None) -> Iterator[None]:
    """Tell the other ranks if a block raises, instead of letting them wait in ``standardised``.

    Args:
        device: Where the values are.
        group: The processes that will call ``standardised`` after the block. None: this one alone.

    Yields:
        Nothing.
    """
    try:
        yield
    except Exception:
        if group is not None:
            _of_all_ranks([0.0, 0.0, 0.0], device, group)
        raise


def standardised(
    values: Tensor, valid: Tensor, group: ProcessGroup | None, *, weights: Tensor | None = None
) -> Tensor:
    """Bring the valid values to mean 0 and standard deviation 1.

    Mean and variance are computed in double precision. With a group they are those of all ranks
    together, the same on every rank bit for bit. They cost one all-reduce of three numbers a rank.

    Args:
        values: Shape (T, N).
        valid: True where a value counts, shape (T, N).
        group: The processes that hold the values. None: this process alone.
        weights: How much each value counts, above 0, shape (T, N). None: all count alike.

    Returns:
        Shape (T, N). It is 0 where a value is not valid, and everywhere if all valid values of all
        ranks are equal.

    Raises:
        RankError: If another rank raised or was lost.
    """
    used = values[valid].cpu().double()  # on the CPU: some devices have no double precision
    own = _moments(used.detach(), None if weights is None else weights[valid].cpu().double())
    ranks = [own] if group is None else _of_all_ranks(own, values.device, group)
    if group is not None:
        _require_values(ranks, group)
    mean, deviation = _combined(ranks)
    result = torch.zeros_like(values, dtype=torch.result_type(values, 1.0))
    if deviation > 0:
        result[valid] = ((used - mean) / deviation).to(result)
    return result


def _moments(values: Tensor, weights: Tensor | None) -> list[float]:
    """Return the number of values (B,), their mean, and the sum of their squared deviations.

    With weights, the number is their sum.
    """
    rest = values - values[0]  # so that equal values have no deviation, not even by rounding
    if weights is None:
        mean = rest.mean()
        return [float(len(values)), float(values[0] + mean), float((rest - mean).square().sum())]
    mean = (weights * rest).sum() / weights.sum()
    squares = weights * (rest - mean).square()
    return [float(weights.sum()), float(values[0] + mean), float(squares.sum())]


def _combined(ranks: list[list[float]]) -> tuple[float, float]:
    """Return the mean and the standard deviation of all ranks' values.

    Source:
        Chan, Golub & LeVeque, "Updating Formulae and a Pairwise Algorithm for Computing Sample
        Variances", 1979.
    """
    number = sum(count for count, _, _ in ranks)
    origin = ranks[0][1]  # so that equal means have no deviation, not even by rounding
    mean = origin + sum(count * (each - origin) for count, each, _ in ranks) / number
    squares = sum(inner + count * (each - mean) ** 2 for count, each, inner in ranks)
    return mean, math.sqrt(squares / number)


def _of_all_ranks(own: list[float], device: torch.device, group: ProcessGroup) -> list[list[float]]:
    """Return every rank's numbers, in the order of the ranks."""
    backends = str(dist.get_backend_config(group))
    place = device if f"{device.type}:" in backends else torch.device(backends.split(":")[0])
    table = torch.zeros(dist.get_world_size(group), len(own), dtype=torch.float64, device=place)
    table[dist.get_rank(group)] = torch.tensor(own, dtype=torch.float64)
    try:
        dist.all_reduce(table, group=group)
    except RuntimeError as error:
        raise RankError(
            "Another rank was lost, or did not call policy_closure(standardise=True) within the "
            "group's timeout. End this process, and start all ranks again from the last "
            f"checkpoint, as torchrun does with --max-restarts.\n{error}",
            lost=True,
        ) from error
    found: list[list[float]] = table.tolist()
    return found


def _require_values(ranks: list[list[float]], group: ProcessGroup) -> None:
    """Check that every rank had values; one that raised had none."""
    failed = [index for index, (count, _, _) in enumerate(ranks) if not count]
    if failed:
        names = ", ".join(f"rank {dist.get_global_rank(group, index)}" for index in failed)
        raise RankError(
            f"policy_closure() raised an error on {names}, so the advantages of all ranks cannot "
            "be standardised. No parameter has moved. See the error there."
        )
