"""Whether all ranks have the same parameters and hyperparameters, and end a step alike."""

from __future__ import annotations

import json
import math
import zlib
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from trpo_optim.closure.closures import Closures
from trpo_optim.closure.parameter_memory import remembered
from trpo_optim.closure.parameters import ParameterVector, trainable
from trpo_optim.closure.transaction import Transaction
from trpo_optim.curvature.batch import Batch
from trpo_optim.curvature.engine_choice import learned
from trpo_optim.distributed.collectives import Reduction
from trpo_optim.distributed.fsdp import require_closures, require_served
from trpo_optim.errors import RankError
from trpo_optim.hyperparameters import Hyperparameters

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

__all__ = ["Ready", "agreed", "checksum", "fingerprint", "odd_ones"]

_CHUNK = 1 << 22  # elements; bounds the memory that a fingerprint takes
_FACTOR = -7046029254386353131  # odd and without a pattern: 2⁶⁴ over the golden ratio


@dataclass(frozen=True)
class Ready:
    """What a rank is about to take a step with.

    Attributes:
        settings: The hyperparameters.
        vector: The parameters.
        transaction: Holds their values.
        closures: This rank's.
        batch: The same, to be evaluated; None where there are none.
        memory: The root of the mean squared gradient, shape (n,); None if it is not kept.
    """

    settings: Hyperparameters
    vector: ParameterVector
    transaction: Transaction
    closures: Closures
    batch: Batch | None
    memory: Tensor | None

    @classmethod
    def of(
        cls,
        groups: Sequence[dict[str, Any]],
        settings: Hyperparameters,
        closures: Closures,
        state: Mapping[Tensor, dict[str, Any]],
        group: ProcessGroup | None,
    ) -> Ready:
        """Return closures on the parameters of all groups, not yet evaluated.

        Args:
            groups: ``param_groups``.
            settings: The hyperparameters that they agree on.
            closures: This rank's.
            state: What the optimizer keeps of every parameter.
            group: The processes that step together, or None.
        """
        vector = ParameterVector(trainable(groups))
        require_served(vector, group, settings)
        transaction = Transaction(vector)
        choices = learned(groups[0])
        batch = None
        if closures.parts:
            batch = Batch(closures, vector, transaction, choices, settings.engine)
        transaction.hold(closures.every)
        memory = remembered(state, vector) if settings.keeps_gradients else None
        return cls(settings, vector, transaction, closures, batch, memory)

    def row(self) -> list[float]:
        """Return, as numbers: shapes, hyperparameters, values, weight, whether given, closures."""
        weights = self.closures.weights
        weight = len(self.closures.parts) if weights is None else sum(weights)
        counted = float(weights is not None) if weight > 0 else math.nan
        texts = (self.vector.shapes(), _written(self.settings))
        vectors = (self.transaction.origin, self.memory)
        prints = [
            (0.0, 0.0) if each is None or self.vector.fsdp else fingerprint(each)
            for each in vectors  # with FSDP, every rank has its own part
        ]
        count = len(self.closures.every)
        return [*map(checksum, texts), *prints[0], weight, counted, *prints[1], count]


def agreed(reduction: Reduction, prepare: Callable[[], Ready]) -> tuple[Ready, list[float]]:
    """Check that all ranks may take one step together.

    Args:
        reduction: The collectives.
        prepare: Makes this rank ready; it may raise.

    Returns:
        What it made, and the weights of all ranks in their order.

    Raises:
        RankError: If they may not: the text names who parted, and in what.
    """
    own: list[Ready] = []

    def work() -> list[float]:
        own.append(prepare())
        return own[0].row()

    rows = reduction.rows(work, 9)
    shapes, settings, _, _, weights, flags, *_, counts = map(list, zip(*rows, strict=True))
    if others := odd_ones(shapes):
        texts = reduction.texts(own[0].vector.shapes())
        raise RankError(
            f"The parameters' shapes or types on {_names(reduction, others)} differ from the other "
            f"ranks ({texts[others[0]]}). Build the same policy on every rank, and pass the same "
            "parameters to the optimizer. FullyShardedDataParallel gives every rank other shapes; "
            "use fully_shard instead."
        )
    if odd_ones(settings):
        raise RankError(
            f"The hyperparameters differ between ranks: {_differences(reduction, own[0])}. Give "
            "every rank the same values and the same schedules."
        )
    if others := odd_ones([tuple(row[2:4]) for row in rows]):
        raise RankError(
            f"The parameters of {_names(reduction, others)} differ from the other ranks. Start "
            "from the same parameters (the same seed, the same checkpoint, or "
            "torch.distributed.broadcast from one rank), and move them by step() only. Run every "
            "rank on the same type of machine, with the same torch and number of threads. If "
            "FullyShardedDataParallel has sharded the parameters, use fully_shard instead."
        )
    if others := odd_ones([tuple(row[6:8]) for row in rows]):
        raise RankError(
            f"What the optimizer keeps of earlier gradients on {_names(reduction, others)} differs "
            "from the other ranks. Load the same checkpoint of the optimizer on every rank."
        )
    if 0.0 in flags and 1.0 in flags:
        raise RankError(
            f"weights was given on {_names(reduction, _where(flags, 1.0))} and left out on "
            f"{_names(reduction, _where(flags, 0.0))}. Give it on every rank, or on none."
        )
    if own[0].vector.fsdp:
        require_closures(reduction, counts, weights)
    if not sum(weights) > 0:
        raise RankError("No rank has a sample: all closures or weights are left out. Pass some.")
    return own[0], weights


def fingerprint(vector: Tensor) -> tuple[float, float]:
    """Return two numbers that tell any two vectors apart that differ in a bit, but by chance.

    They are the halves of the sum of the bits of every element, taken as a whole number, times an
    odd number of its place, modulo 2⁶⁴: the same on every kind of machine.

    Args:
        vector: In single or double precision, shape (n,).
    """
    bits = vector.view(torch.int64 if vector.element_size() == 8 else torch.int32)
    places = torch.arange(1, 2 * min(len(bits), _CHUNK), 2, device=bits.device).mul_(_FACTOR)
    total = 0
    for index, chunk in enumerate(bits.split(_CHUNK)):
        part = int((chunk.to(torch.int64) * places[: len(chunk)]).sum())
        total = (total * 3 + part + index) % (1 << 64)
    return float(total >> 32), float(total & 0xFFFFFFFF)


def odd_ones(values: Sequence[Any]) -> list[int]:
    """Return which ranks have another value than most; the first has most where all are as many.

    Args:
        values: One of each rank.
    """
    ((usual, _),) = Counter(values).most_common(1)
    return [rank for rank, value in enumerate(values) if value != usual]


def checksum(text: str) -> float:
    """Return a number that tells texts apart.

    Args:
        text: Any.
    """
    return float(zlib.crc32(text.encode()))


def _written(settings: Hyperparameters) -> str:
    return json.dumps(asdict(settings))


def _differences(reduction: Reduction, own: Ready) -> str:
    """Return which hyperparameters differ, with the values and their ranks."""
    found = [json.loads(text) for text in reduction.texts(_written(own.settings))]
    sentences = []
    for name in Hyperparameters.names():
        ranks: dict[Any, list[int]] = {}
        for rank, settings in enumerate(found):
            ranks.setdefault(settings[name], []).append(rank)
        if len(ranks) > 1:
            values = (f"{value!r} on {_names(reduction, where)}" for value, where in ranks.items())
            sentences.append(f"{name} is {' and '.join(values)}")
    return "; ".join(sentences)


def _names(reduction: Reduction, ranks: Sequence[int]) -> str:
    """Return what ranks are called, the first few of many."""
    named = ", ".join(reduction.name(rank) for rank in ranks[:5])
    return named if len(ranks) <= 5 else f"{named} and {len(ranks) - 5} others"


def _where(flags: Sequence[float], value: float) -> list[int]:
    return [rank for rank, flag in enumerate(flags) if flag == value]
