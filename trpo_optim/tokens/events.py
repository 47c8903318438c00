"""The events over which the exact KL of tokens is computed."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, TypeAlias

import torch
from torch import Tensor

from trpo_optim.distributions.arguments import is_count
from trpo_optim.errors import TrustRegionError

__all__ = ["Events", "OldPolicy", "events_of", "require_mass", "require_old"]

OldPolicy: TypeAlias = int | Literal["log_prob", "logits"]
"""What is kept of the old policy."""

_LEAST_MASS = 0.9
"""The probability that the likeliest tokens must hold, on average over the positions."""


@dataclass(frozen=True)
class Events:
    """Single tokens, and all other tokens of the vocabulary as one event.

    Attributes:
        single: The tokens that are events of their own, (m, k). None: all tokens.
        mass: The probability that these tokens hold, the sum over positions.
    """

    single: Tensor | None
    mass: float

    def logits(self, logits: Tensor) -> Tensor:
        """Return the logits of the events, (m, k + 1), of logits of tokens, (m, V)."""
        if self.single is None:
            return logits
        # Not −inf: where the policy rules out all other tokens, that would be a slope of NaN.
        nothing = torch.finfo(logits.dtype).min
        others = logits.scatter(-1, self.single, nothing).logsumexp(-1, keepdim=True)
        return torch.cat([logits.gather(-1, self.single), others], -1)


def events_of(logits: Tensor, old: int | Literal["logits"]) -> Events:
    """Return the events that are kept of an old policy.

    Args:
        logits: The old policy's logits, (m, V).
        old: ``"logits"``: all tokens. An integer k: the k likeliest tokens, and all others as one
            event. If k is V − 1 or more, all tokens are events.
    """
    if old == "logits" or old >= logits.shape[-1] - 1:
        return Events(None, float(len(logits)))
    likeliest = logits.topk(old)
    masses = (likeliest.values.logsumexp(-1) - logits.logsumexp(-1)).exp()
    return Events(likeliest.indices, float(masses.sum()))


def require_mass(old: OldPolicy, mass: float) -> None:
    """Check that the tokens that are events of their own hold most of the probability.

    Args:
        old: What is kept of the old policy.
        mass: The probability of these tokens, the mean over all positions that count.

    Raises:
        TrustRegionError: If it is too little.
    """
    if mass < _LEAST_MASS:
        raise TrustRegionError(
            f"old is {old}, and the {old} likeliest tokens hold {mass:.1%} of the probability on "
            f"average; they must hold at least {_LEAST_MASS:.0%}. The KL does not see what moves "
            "between the other tokens. Keep more tokens, or pass old='logits' or old='log_prob'."
        )


def require_old(old: OldPolicy) -> OldPolicy:
    """Check what is to be kept of the old policy; return it, and a number as Python's."""
    if isinstance(old, str) and old in ("log_prob", "logits"):
        return old
    if not is_count(old):
        raise TrustRegionError(
            f"old is {old!r}; it must be 'log_prob', 'logits', or the number of likeliest tokens, "
            "at least 1."
        )
    return int(old)
