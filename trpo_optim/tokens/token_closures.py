"""The optimizer's closures on a batch of token sequences, in one call."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from trpo_optim.closure.closures import Closures
from trpo_optim.closure.evaluation import Closure
from trpo_optim.closure.random_state import random_state_kept
from trpo_optim.distributions.arguments import require_tensor
from trpo_optim.distributions.masks import Per, of_sequences, require_per
from trpo_optim.errors import TrustRegionError
from trpo_optim.tokens.arguments import (
    counted_tokens,
    penalty_weight,
    require_aligned,
    require_batching,
    require_drawn,
    require_head,
    require_hidden,
    require_log_probs,
    require_numbers,
    require_possible,
    require_sequences,
    require_temperature,
    require_vocabulary,
)
from trpo_optim.tokens.comparison import Comparison, Head, Outputs
from trpo_optim.tokens.estimates import reference_kl, token_surrogate, weighted_excess
from trpo_optim.tokens.events import OldPolicy, require_mass, require_old
from trpo_optim.tokens.log_prob import spread

__all__ = ["token_closures"]

_CHUNK = 1024
"""The most positions whose logits exist at once, unless the caller says otherwise."""


def token_closures(
    outputs: Callable[[Any], Tensor],
    tokens: Tensor,
    mask: Tensor | None,
    advantages: Tensor,
    *,
    head: Callable[[Tensor], Tensor] | None = None,
    chunk: int | None = None,
    behaviour_log_prob: Tensor | None = None,
    old_log_prob: Tensor | None = None,
    old: OldPolicy = "log_prob",
    per: Per = "token",
    temperature: float = 1.0,
    micro_batch: int | None = None,
    curvature: float = 1.0,
    reference_log_prob: Tensor | None = None,
    reference_weight: float | None = None,
) -> Closures:
    """Return the closures for one ``optimizer.step`` on sequences of tokens.

    The old policy of the KL is the policy at this call, whatever drew the tokens. To take several
    steps on one rollout, call this function before each step, always with the same
    ``behaviour_log_prob``. The call leaves the random state as it was: a step right after it sees
    the same dropout masks.

    Each closure evaluates a micro-batch. Its weight is its number of tokens (or sequences) that
    count, so that the mean over closures is the mean over the whole batch. Sequences without tokens
    that count are never evaluated.

    Args:
        outputs: Called with some rows, a slice or a tensor of indices. Returns the logits that
            predict ``tokens[rows]``, shape (n, T, V). With a head, it returns the hidden states
            that predict them, (n, T, H). With ``old="log_prob"`` it may also return the
            log-probabilities of ``tokens[rows]``, (n, T).
        tokens: The tokens, integers of shape (N, T). Where the mask is false, any integers.
        mask: True where a token counts, shape (N, T): in the response, not in prompt or padding. To
            check the mask, decode ``tokens[mask]``: it holds the responses and nothing else. An
            inverted mask is an error only if ``behaviour_log_prob`` is 0 wherever it is true. None:
            all count.
        advantages: One number per sequence, (N,), or per token, (N, T).
        head: Maps hidden states, (n, H), to logits, (n, V); usually the model's last layer. Logits
            are then made for ``chunk`` positions at a time, and made again in the backward pass.
            None: the function returns logits.
        chunk: With a head, the most positions whose logits exist at once. None: 1024. Without a
            head, it must be None.
        behaviour_log_prob: ln π of what drew the tokens, (N, T): an earlier policy, or an inference
            server. None: the present policy drew them.
        old_log_prob: ln π of the present policy, (N, T), if you have computed it with the
            parameters as they are. The call then evaluates nothing. It needs ``old="log_prob"``,
            and a model without dropout. ``optimizer.step`` raises an error if the KL from these
            numbers is more than a tenth of the radius. None: this call computes it.
        old: What is kept of the old policy for the KL. ``"log_prob"``: one log-probability per
            token. The KL is estimated on the tokens, without bias: with ``behaviour_log_prob``,
            each token is weighted by π_old/π_behaviour. ``"logits"``: all logits of tokens that
            count. The KL is exact. If a head is given that is not trained, the hidden states are
            kept instead. An integer k: the k likeliest tokens, and all others as one event. This KL
            is a lower bound of the exact KL (data-processing inequality), and equal to it if k is
            V − 1 or more.
        per: ``"token"``: loss and KL are means over tokens. ``"sequence"``: they are means over
            sequences of the sum over tokens.
        temperature: The temperature at which the tokens were drawn. Loss and KL are those of the
            policy at this temperature.
        micro_batch: The most sequences to evaluate at once. None: all.
        curvature: The share of the sequences, in (0, 1], that Fisher-vector products are taken on.
            These sequences are evenly spaced, and evaluated at once. 1: all, in micro-batches.
        reference_log_prob: ln π of a reference policy, (N, T). It needs ``reference_weight``.
        reference_weight: The weight of ``reference_kl`` in the loss. 0 leaves the penalty out.

    Returns:
        The closures. Their weights also weigh the ranks of a process group; every rank needs a
        token that counts. With ``old="log_prob"``, the KL is a scalar. Otherwise it is a vector
        with one KL per token or per sequence, so that ``constraint="max"`` works, too. The third
        value is what the KL is computed from, of the m tokens that count: log-probabilities, (m,),
        logits, (m, V), or hidden states, (m, H).

    Raises:
        TrustRegionError: If shapes do not fit, a number is not finite where a token counts, no
            token counts, ``behaviour_log_prob`` is 0 wherever one does, an option is outside its
            range, or the k likeliest tokens hold less than 90 % of the probability.

    Example:
        >>> import torch
        >>> from trpo_optim import TrustRegionOptimizer
        >>> from trpo_optim.tokens import token_closures
        >>> model = torch.nn.Sequential(torch.nn.Embedding(20, 8), torch.nn.Linear(8, 20))
        >>> tokens = torch.randint(20, (6, 10))  # prompts of 4 tokens, then responses
        >>> mask = torch.ones(6, 9).bool()
        >>> mask[:, :3] = False
        >>> def logits(rows):
        ...     return model(tokens[rows])[:, :-1]
        >>> closures = token_closures(logits, tokens[:, 1:], mask, advantages=torch.randn(6))
        >>> TrustRegionOptimizer(model.parameters()).step(closures).kl <= 0.01
        True

    Source:
        Schulman et al., "Trust Region Policy Optimization" (2015), equation 14 and appendix C.
    """
    require_per(per)
    old = require_old(old)
    require_temperature(temperature)
    require_batching(micro_batch, curvature)
    penalty = penalty_weight(reference_weight, reference_log_prob)
    require_sequences(outputs, tokens)
    counted = counted_tokens(tokens, torch.ones_like(tokens) if mask is None else mask)
    assert counted is not None
    require_vocabulary(tokens[counted], math.inf)
    require_tensor("advantages", advantages)
    if advantages.shape == tokens.shape[:1]:
        advantages = advantages[:, None].expand(tokens.shape)
    reference = reference_log_prob if penalty else None
    if old_log_prob is not None and old != "log_prob":
        raise TrustRegionError(
            f"old_log_prob is given and old is {old!r}, which needs more of the old policy than "
            "one number per token. Pass old='log_prob', or leave old_log_prob out."
        )
    named = {
        "behaviour_log_prob": behaviour_log_prob,
        "old_log_prob": old_log_prob,
        "reference_log_prob": reference,
    }
    for name, values in {"advantages": advantages, **named}.items():
        if values is not None:
            require_numbers(name, values, counted)
    whole = _Part(tokens, counted, advantages, behaviour_log_prob, old_log_prob, reference)
    require_head(head, chunk)
    read = Outputs(temperature, None if head is None else Head(head, int(chunk or _CHUNK)))
    options = _Options(read, old, per, penalty)

    def closure(rows: Tensor) -> tuple[Closure, float, float]:
        place: Any = slice(None) if len(rows) == len(tokens) else rows
        return _closure(lambda: outputs(place), whole.of(place), options)

    used = counted.any(1).nonzero().flatten()
    pieces = used.split(int(micro_batch or len(used)))
    parts, masses, log_probs = zip(*map(closure, pieces), strict=True)
    require_mass(old, sum(masses) / int(counted.sum()))
    if behaviour_log_prob is not None:
        require_drawn(behaviour_log_prob, counted, sum(log_probs) / int(counted.sum()))
    taken = max(1, round(curvature * len(used)))
    spaced = used[torch.arange(taken, device=used.device) * len(used) // taken]
    return Closures(
        parts=list(parts),
        weights=[float(len(rows) if per == "sequence" else counted[rows].sum()) for rows in pieces],
        curvature=None if taken == len(used) else closure(spaced)[0],
    )


@dataclass(frozen=True)
class _Part:
    """Some sequences: tensors of shape (n, T)."""

    tokens: Tensor
    mask: Tensor
    advantages: Tensor
    behaviour: Tensor | None
    old: Tensor | None
    reference: Tensor | None

    def of(self, rows: Any) -> _Part:
        """Return some of the sequences."""

        def some(values: Tensor | None) -> Tensor | None:
            return None if values is None else values[rows]

        return _Part(
            tokens=self.tokens[rows],
            mask=self.mask[rows],
            advantages=self.advantages[rows],
            behaviour=some(self.behaviour),
            old=some(self.old),
            reference=some(self.reference),
        )


@dataclass(frozen=True)
class _Options:
    """What ``token_closures`` was told about loss and KL."""

    outputs: Outputs
    old: OldPolicy
    per: Per
    reference_weight: float


def _closure(
    evaluate: Callable[[], Tensor], part: _Part, options: _Options
) -> tuple[Closure, float, float]:
    """Return the closure on some sequences, the probability that its events see, and ln π_old.

    The policy at this call is the old policy. Both numbers are sums over tokens that count.
    """
    mask, per = part.mask, options.per
    all_count = bool(mask.all())

    def of_counted() -> Tensor:
        """Return the user's outputs at the m tokens that count, (m, …)."""
        outputs = evaluate()
        _require_outputs(outputs, part.tokens, options)
        return outputs.flatten(0, 1) if all_count else outputs[mask]  # a mask copies all logits

    with torch.no_grad(), random_state_kept([mask.device]):
        start = of_counted() if part.old is None else part.old[mask]
        compare = Comparison(start, part.tokens[mask], options.outputs, options.old)
    checked = part.old is None  # these are of the outputs, then

    def check(log_prob: Tensor) -> None:
        require_log_probs("outputs(rows)", log_prob)
        if part.behaviour is None or part.old is not None:
            require_possible(log_prob)

    if checked:
        check(compare.log_prob)
    old_log_prob = spread(compare.log_prob, mask)
    base = old_log_prob if part.behaviour is None else part.behaviour

    def closure() -> tuple[Tensor, Tensor, Tensor]:
        nonlocal checked
        log_prob, kl, third = compare(of_counted())
        if not checked:
            check(log_prob.detach())
            checked = True
        new = spread(log_prob, mask)
        loss = token_surrogate(new, base, part.advantages, mask, per=per)
        if part.reference is not None:
            penalty = reference_kl(new, part.reference, base, mask, per=per)
            loss = loss + options.reference_weight * penalty
        if kl is None:
            return loss, weighted_excess(old_log_prob, new, base, mask, per), third
        return loss, of_sequences(spread(kl, mask), mask) if per == "sequence" else kl, third

    return closure, compare.mass, float(compare.log_prob.sum())


def _require_outputs(outputs: Any, tokens: Tensor, options: _Options) -> None:
    """Check what the user's function returned for some rows."""
    if not isinstance(outputs, Tensor):
        raise TrustRegionError(
            f"outputs(rows) returned a {type(outputs).__name__}. Return a tensor, such as "
            "model(...).logits[:, :-1]."
        )
    if options.outputs.head is not None:
        require_hidden(outputs, tokens)
    elif outputs.shape != tokens.shape:
        require_aligned(outputs, tokens)
    elif options.old != "log_prob":
        raise TrustRegionError(
            f"outputs(rows) returned log-probabilities, shape {tuple(outputs.shape)}, and old is "
            f"{options.old!r}, which needs logits of shape (n, T, V), or hidden states with a "
            "head. Pass old='log_prob'."
        )
    elif options.outputs.temperature != 1:
        raise TrustRegionError(
            "outputs(rows) returned log-probabilities, and temperature is "
            f"{options.outputs.temperature!r}. Pass the temperature where you compute them, and "
            "leave it out here."
        )
