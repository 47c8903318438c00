"""The optimizer's closure on batches of trajectories, in one call."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import accumulate
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from trpo_optim.closure.closures import Closures
from trpo_optim.closure.evaluation import Closure
from trpo_optim.closure.random_state import random_state_kept
from trpo_optim.distributed.collectives import Reduction, require_member
from trpo_optim.distributions import entropy, frozen, joint_kl, log_prob, sampled_kl
from trpo_optim.distributions.arguments import require_counts
from trpo_optim.errors import TrustRegionError
from trpo_optim.rollouts.arguments import require_one_a_row
from trpo_optim.rollouts.batch_parts import Part, parts_of
from trpo_optim.rollouts.curvature_rows import CurvatureShare, curvature_rows, require_curvature
from trpo_optim.rollouts.given_batches import (
    Given,
    given_for,
    require_alike,
    require_numbers,
    within,
)
from trpo_optim.rollouts.joined_batches import Joined, joined
from trpo_optim.rollouts.kept_log_probs import warn_if_moved
from trpo_optim.rollouts.standardisation import standardised
from trpo_optim.rollouts.surrogate import surrogate
from trpo_optim.rollouts.trajectories import SinglePathBatch

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

__all__ = ["PolicyClosures", "policy_closure"]


@dataclass(frozen=True)
class PolicyClosures(Closures):
    """The closures that ``policy_closure`` returns.

    Attributes:
        batches: The places of the batches that count, in the list that was given. A batch that
            ``max_batch_kl`` left out is missing.

    Example:
        >>> import gymnasium as gym, torch
        >>> from torch.distributions import Categorical
        >>> from trpo_optim.rollouts import policy_closure, single_path
        >>> envs = gym.make_vec("CartPole-v1", num_envs=2, vectorization_mode="sync")
        >>> logits = torch.nn.Linear(4, 2)
        >>> policy = lambda observations: Categorical(logits=logits(observations))
        >>> earlier = single_path(envs, policy, steps=8, seed=0)
        >>> with torch.no_grad():
        ...     _ = logits.bias.add_(torch.tensor([3.0, -3.0]))  # now another policy
        >>> batches = [single_path(envs, policy, steps=8, after=earlier), earlier]
        >>> advantages = [torch.randn(8, 2), torch.randn(8, 2)]
        >>> policy_closure(policy, batches, advantages).batches
        (0, 1)
        >>> policy_closure(policy, batches, advantages, max_batch_kl=0.1).batches
        (0,)
    """

    batches: tuple[int, ...] = (0,)


def policy_closure(
    policy: Callable[..., Any],
    batch: SinglePathBatch | Sequence[SinglePathBatch],
    advantages: Tensor | Sequence[Tensor],
    *,
    batch_weights: Sequence[float] | None = None,
    max_batch_kl: float | None = None,
    standardise: bool = False,
    process_group: ProcessGroup | None = None,
    weights: Tensor | Sequence[Tensor | None] | None = None,
    sampling_log_prob: Tensor | None = None,
    entropy_bonus: float = 0.0,
    sampled: bool = False,
    curvature: CurvatureShare = "auto",
    micro_batch: int | None = None,
    generator: torch.Generator | None = None,
) -> PolicyClosures:
    """Return the closures for one ``optimizer.step`` on a batch, or on several.

    The old policy is the policy at this call, which leaves the random state as it was: a step right
    after it sees the same dropout masks. The KL is one per sample. The third value is the
    distribution. A warning says if another policy than this one drew a single batch.

    Earlier batches make the step less noisy. Each ratio is taken to the policy that drew the
    action, ``batch.log_prob``. The KL is still that of the step: from the old policy, on the states
    of all batches.

    Args:
        policy: The policy that collected the batch, called as in ``single_path``. With a recurrent
            state it is evaluated on whole trajectories, (T, N, …).
        batch: The batch that ``single_path`` returned, or a list of batches, the newest one first.
        advantages: Advantages or Q, shape (T, N); with a list of batches, a list of these. Rows
            that are not valid are ignored. For earlier batches, see ``gae(log_ratios=…)``.
        batch_weights: How much a row of each batch counts in loss and KL, such as ``(1.0, 0.5)``.
            None: all rows count alike.
        max_batch_kl: The most KL(behaviour ‖ old) of a batch, in nats, estimated on its own actions
            by the mean of ρ − 1 − ln ρ. A batch with more is left out, but never the first one.
            This costs one more evaluation of each earlier batch. None: all batches count.
        standardise: Bring the advantages of the valid rows to mean 0 and standard deviation 1. If
            all are equal, they become 0. With several batches, over the rows of all batches, which
            count by their ``batch_weights``.
        process_group: With ``standardise=True``: use mean and standard deviation over the valid
            rows of all ranks. Every rank must call this function. None: over this process.
        weights: Importance weights of the states, (T, N), if another policy visited them. With a
            list of batches, a list of these; None in the list counts as 1.
        sampling_log_prob: ln q(a|s) of the actions, (T, N), if another policy drew them. A list of
            batches has these already.
        entropy_bonus: The weight of the mean entropy, in (standardised) advantages per nat.
        sampled: Whether to estimate the KL on the batch's actions, for policies without a
            closed-form KL. It is then a mean.
        curvature: Which rows Fisher-vector products are taken on. ``"auto"``: as many random rows
            as they need, such as 1365 of 2048 rows, 2731 of 8192, and a tenth of 37 000 or more.
            With a recurrent state or ``sampled=True``, they need more, and ``"auto"`` takes all. A
            share in (0, 1): this share of the rows (environments, with a recurrent state). None:
            all rows.
        micro_batch: The most rows (or environments) to evaluate at once. None: all. Rows that are
            drawn for curvature are evaluated at once, too. If ``"auto"`` needs more than
            ``micro_batch``, it takes all rows; a share does not look at ``micro_batch``.
        generator: The generator that draws these rows. None: for ``"auto"``, a generator with a
            fixed seed, the same rows in every call with as many; for a share, torch's global
            generator.

    Returns:
        The closures, weighed by their samples. Every rank of a process group draws its own rows for
        curvature. Its products weigh as its whole batch.

    Raises:
        TrustRegionError: If shapes do not fit, a used advantage or weight is not finite, there are
            no valid rows, an option is outside its range, a batch of a list has no ``log_prob``, or
            the batches differ in their form.
        RankError: If another rank of the process group raised or was lost.

    Example:
        >>> import gymnasium as gym, torch
        >>> from torch.distributions import Categorical
        >>> from trpo_optim import TrustRegionOptimizer
        >>> from trpo_optim.rollouts import policy_closure, single_path
        >>> envs = gym.make_vec("CartPole-v1", num_envs=2, vectorization_mode="sync")
        >>> logits = torch.nn.Linear(4, 2)
        >>> policy = lambda observations: Categorical(logits=logits(observations))
        >>> batch = single_path(envs, policy, steps=16)
        >>> closures = policy_closure(policy, batch, advantages=torch.randn(16, 2))
        >>> TrustRegionOptimizer(logits.parameters()).step(closures).kl <= 0.01
        True

    Source:
        Schulman et al. (2015), equation 14 and appendix C.
    """
    if process_group is not None and not standardise:
        raise TrustRegionError(
            "process_group is given and standardise is False. Only standardising needs the other "
            "ranks: pass standardise=True, or leave process_group out."
        )
    require_member(process_group)
    ranks = None if process_group is None else Reduction(process_group, call="policy_closure()")

    def checked() -> list[Given]:
        given = given_for(
            batch,
            advantages,
            weights=weights,
            sampling_log_prob=sampling_log_prob,
            batch_weights=batch_weights,
            max_batch_kl=max_batch_kl,
        )
        require_counts(micro_batch=micro_batch)
        require_curvature(curvature)
        if not math.isfinite(entropy_bonus):
            raise TrustRegionError(
                f"entropy_bonus is {entropy_bonus!r}; it must be a finite number."
            )
        if sampled and sampling_log_prob is not None:
            raise TrustRegionError(
                "sampled=True needs actions of the old policy, but sampling_log_prob says that "
                "another policy drew them. Leave out one of the two."
            )
        if sampled and given[0].index is not None:
            raise TrustRegionError(
                "sampled=True needs actions of the old policy, but earlier policies draw those of "
                "a list of batches. Pass one batch that is not in a list, or leave out sampled."
            )
        require_alike(given)
        for each in given:
            require_numbers(each)
        return given

    given = checked() if ranks is None else ranks.same(checked)

    def prepared() -> tuple[Joined, Tensor | None]:
        data = joined(within(policy, given, max_batch_kl))
        share = None if curvature == "auto" and (sampled or data.state is not None) else curvature
        count = sum(count for count, _ in data.runs)
        return data, curvature_rows(share, count, generator, most=micro_batch)

    data, chosen = prepared() if ranks is None else ranks.same(prepared)
    estimates = data.advantages
    if standardise:
        estimates = standardised(estimates, data.valid, ranks, weights=data.batch_weights)

    built = partial(
        _closures,
        parts_of(policy, data),
        data,
        estimates,
        chosen,
        entropy_bonus,
        sampled=sampled,
        micro_batch=micro_batch,
    )
    return built() if ranks is None else ranks.same(built)


def _closures(
    select: Callable[[Tensor], Part],
    data: Joined,
    advantages: Tensor,
    chosen: Tensor | None,
    entropy_bonus: float,
    *,
    sampled: bool,
    micro_batch: int | None,
) -> PolicyClosures:
    """Return the closures on all rows, piece by piece, and the one for products on chosen rows."""

    def closure(part: Part, *, weighed: bool = False) -> Closure:
        def numbers(values: Tensor | None) -> Tensor | None:
            return None if values is None else part.numbers(values)

        return _closure(
            part,
            part.numbers(advantages),
            numbers(data.weights),
            numbers(data.sampling_log_prob),
            None if weighed else numbers(data.drawn_log_prob),
            numbers(data.batch_weights) if weighed else None,
            entropy_bonus,
            sampled=sampled,
        )

    ends = list(accumulate(count for count, _ in data.runs))
    pieces = [
        (select(rows), weight)
        for end, (count, weight) in zip(ends, data.runs, strict=True)
        for rows in torch.arange(end - count, end, device="cpu").split(micro_batch or count)
    ]
    return PolicyClosures(
        parts=[closure(piece) for piece, _ in pieces],
        weights=[piece.count * weight for piece, weight in pieces],
        curvature=None if chosen is None else closure(select(chosen), weighed=True),
        batches=data.batches,
    )


def _closure(
    part: Part,
    advantages: Tensor,
    weights: Tensor | None,
    sampling_log_prob: Tensor | None,
    drawn_log_prob: Tensor | None,
    shares: Tensor | None,
    entropy_bonus: float,
    *,
    sampled: bool,
) -> Closure:
    """Return the closure on some rows, the policy as it is being the old one.

    With ``shares``, which count up to a common factor, the KL's mean weighs the rows by them.
    """
    with torch.no_grad(), random_state_kept([advantages.device]) as drew:
        old = frozen(part.evaluate())
        old_log_prob = part.rows(log_prob(old, part.actions, part.mask))
        require_one_a_row(old_log_prob, len(advantages))
        if drawn_log_prob is not None and not drew():  # not with dropout
            warn_if_moved(drawn_log_prob, old_log_prob)
    base = old_log_prob if sampling_log_prob is None else sampling_log_prob

    def closure() -> tuple[Tensor, Tensor, Any]:
        dist = part.evaluate()
        new_log_prob = part.rows(log_prob(dist, part.actions, part.mask))
        loss = surrogate(new_log_prob, base, advantages, weights=weights)
        if entropy_bonus:
            loss = loss - entropy_bonus * part.rows(entropy(dist, part.mask)).mean()
        if sampled:
            return loss, sampled_kl(old_log_prob, new_log_prob, low_variance=True), new_log_prob
        kl = joint_kl(old, dist, part.mask)
        return loss, kl if shares is None else kl * (shares / shares.mean()), dist

    return closure
