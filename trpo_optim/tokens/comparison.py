"""The present policy beside the old one, at the tokens that count."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor
from torch.distributions import Categorical

from trpo_optim.distributions.parts import require_valid
from trpo_optim.distributions.precision import widened
from trpo_optim.tokens.arguments import require_logits_of_head, require_vocabulary
from trpo_optim.tokens.chunks import evaluated_again
from trpo_optim.tokens.events import Events, OldPolicy, events_of
from trpo_optim.tokens.exact_kl import exact_kl
from trpo_optim.tokens.log_prob import at_temperature, chosen, log_sum_exp

__all__ = ["Compared", "Comparison", "Head", "Outputs"]


@dataclass(frozen=True)
class Head:
    """What maps hidden states, (n, H), to logits, (n, V).

    Attributes:
        function: The user's.
        chunk: The most positions whose logits exist at once.
    """

    function: Callable[[Tensor], Tensor]
    chunk: int


@dataclass(frozen=True)
class Outputs:
    """How log-probabilities are computed from what the user's function returns.

    Attributes:
        temperature: What logits are divided by.
        head: What is applied to hidden states. None: the function returns logits, or the
            log-probabilities themselves.
    """

    temperature: float
    head: Head | None = None

    def logits(self, rows: Tensor) -> Tensor:
        """Return the logits, (m, V), of outputs at m tokens."""
        if self.head is None:
            return at_temperature(rows, self.temperature)
        logits = self.head.function(rows)
        require_logits_of_head(logits, rows)
        return at_temperature(logits, self.temperature)


class Compared(NamedTuple):
    """The present policy at m tokens.

    Attributes:
        log_prob: ln π of the tokens, (m,).
        kl: KL(old ‖ present) at each token, (m,); None if it is to be estimated.
        third: What both are computed from, for Gauss–Newton products.
    """

    log_prob: Tensor
    kl: Tensor | None
    third: Tensor


@dataclass(frozen=True)
class _Chunk:
    """What is kept of the old policy at some tokens. All but the tokens may be None.

    Attributes:
        tokens: (m,).
        events: Between what the KL distinguishes.
        logs: ln π of the old policy over the events, (m, E).
        hidden: In place of them: the old hidden states, (m, H), for a head that no step moves.
        unseen: Whether no logits have shown yet how large the vocabulary is.
    """

    tokens: Tensor
    events: Events | None = None
    logs: Tensor | None = None
    hidden: Tensor | None = None
    unseen: bool = False


class Comparison:
    """Compares the policy with what it was when this object was made.

    Attributes:
        log_prob: The old ln π of the tokens, (m,).
        mass: The old probability of the events that are single tokens, summed over the tokens.
    """

    def __init__(self, start: Tensor, tokens: Tensor, outputs: Outputs, old: OldPolicy) -> None:
        """Keep the old policy.

        Args:
            start: The old policy's outputs at the tokens: logits, (m, V), log-probabilities, (m,),
                or hidden states, (m, H).
            tokens: (m,).
            outputs: How log-probabilities are computed from them.
            old: What to keep.
        """
        self._outputs = outputs
        self._chunks: list[_Chunk] = []
        logs = []
        self.mass = float(len(tokens)) if old == "log_prob" else 0.0
        for rows, picked in zip(self._split(start), self._split(tokens), strict=True):
            chunk, log_prob = self._kept(rows, picked, old)
            self._chunks.append(chunk)
            logs.append(log_prob)
            self.mass += 0.0 if chunk.events is None else chunk.events.mass
        self.log_prob = torch.cat(logs)

    def __call__(self, rows: Tensor) -> Compared:
        """Compare the present policy's outputs, in the shape of the old ones."""
        if self._outputs.head is None:
            (chunk,) = self._chunks
            whole = self._measured(chunk, rows)
            return whole if whole.kl is not None else whole._replace(third=whole.log_prob)

        def numbers(chunk: _Chunk, piece: Tensor) -> tuple[Tensor, Tensor | None]:
            """Compare the policies at a chunk of tokens, and leave its logits behind."""
            return self._measured(chunk, piece)[:2]

        pairs = zip(self._chunks, self._split(rows), strict=True)
        found = [evaluated_again(partial(numbers, chunk), piece) for chunk, piece in pairs]
        log_prob = torch.cat([each for each, _ in found])
        kls = [each for _, each in found if each is not None]
        return (
            Compared(log_prob, torch.cat(kls), rows) if kls else Compared(log_prob, None, log_prob)
        )

    def _split(self, rows: Tensor) -> Sequence[Tensor]:
        head = self._outputs.head
        return (rows,) if head is None else rows.split(head.chunk)

    def _kept(self, rows: Tensor, tokens: Tensor, old: OldPolicy) -> tuple[_Chunk, Tensor]:
        """Return what to keep at some tokens, and their log-probabilities."""
        if rows.dim() == 1:
            return _Chunk(tokens, unseen=True), widened(rows, torch.float32)
        logits = self._outputs.logits(rows)
        require_vocabulary(tokens, logits.shape[-1])
        events = None if old == "log_prob" else events_of(logits, old)
        if events is None:
            return _Chunk(tokens), chosen(logits, tokens) - log_sum_exp(logits)
        told = events.logits(logits)
        total = log_sum_exp(told)
        if not total.isfinite().all():
            require_valid(Categorical(logits=told))
        log_prob = chosen(logits, tokens) - total
        if old == "logits" and self._outputs.head is not None and not self._head_is_moved(rows):
            return _Chunk(tokens, events, hidden=rows.clone()), log_prob
        return _Chunk(tokens, events, logs=told - total[:, None]), log_prob

    def _head_is_moved(self, rows: Tensor) -> bool:
        """Return whether the logits depend on anything that is trained, besides the outputs."""
        with torch.enable_grad():
            return self._outputs.logits(rows[:1].detach()).requires_grad

    def _measured(self, chunk: _Chunk, rows: Tensor) -> Compared:
        """Compare the policies at some tokens."""
        if rows.dim() == 1:
            return Compared(widened(rows, torch.float32), None, rows)
        logits = self._outputs.logits(rows)
        if chunk.events is None:
            if chunk.unseen:
                require_vocabulary(chunk.tokens, logits.shape[-1])
            return Compared(chosen(logits, chunk.tokens) - log_sum_exp(logits), None, logits)
        told, old = chunk.events.logits(logits), chunk.logs
        if chunk.hidden is not None:
            with torch.no_grad():
                before = chunk.events.logits(self._outputs.logits(chunk.hidden))
                old = before - log_sum_exp(before)[:, None]
        assert old is not None  # one of the two is kept
        # Exact products through a head that may be trained cut the graph at log-probabilities.
        cut = self._outputs.head is not None and chunk.hidden is None
        total, kl = exact_kl(old, told, log_probabilities=cut)
        return Compared(chosen(logits, chunk.tokens) - total, kl, told)
