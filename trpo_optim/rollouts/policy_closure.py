"""The optimizer's closure on a batch of trajectories, in one call."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from trpo_optim.closure.closures import Closures
from trpo_optim.closure.evaluation import Closure
from trpo_optim.closure.random_state import random_state_kept
from trpo_optim.distributions import entropy, frozen, joint_kl, log_prob, sampled_kl
from trpo_optim.distributions.nesting import mapped
from trpo_optim.errors import TrustRegionError
from trpo_optim.rollouts.arguments import require_counts
from trpo_optim.rollouts.curvature_rows import CurvatureShare, curvature_rows
from trpo_optim.rollouts.standardisation import standardised
from trpo_optim.rollouts.surrogate import surrogate
from trpo_optim.rollouts.trajectories import SinglePathBatch

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

__all__ = ["policy_closure"]


def policy_closure(
    policy: Callable[..., Any],
    batch: SinglePathBatch,
    advantages: Tensor,
    *,
    standardise: bool = False,
    process_group: ProcessGroup | None = None,
    weights: Tensor | None = None,
    sampling_log_prob: Tensor | None = None,
    entropy_bonus: float = 0.0,
    sampled: bool = False,
    curvature: CurvatureShare = "auto",
    micro_batch: int | None = None,
    generator: torch.Generator | None = None,
) -> Closures:
    """Return the closures for one ``optimizer.step`` on a batch.

    The old policy is the policy at this call, which leaves the random state as it was: a step right
    after it sees the same dropout masks. The KL is one per sample. The third value is the
    distribution.

    Args:
        policy: The policy that collected the batch, called as in ``single_path``. With a recurrent
            state it is evaluated on whole trajectories, (T, N, …).
        batch: The batch that ``single_path`` returned.
        advantages: Advantages or Q, shape (T, N). Rows that are not valid are ignored.
        standardise: Bring the advantages of the valid rows to mean 0 and standard deviation 1. If
            all are equal, they become 0.
        process_group: With ``standardise=True``: use mean and standard deviation over the valid
            rows of all ranks. Every rank must call this function. None: over this process.
        weights: Importance weights of the states, (T, N), if another policy visited them.
        sampling_log_prob: ln q(a|s) of the actions, (T, N), if another policy drew them.
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
            no valid rows, or an option is outside its range.
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
    if not isinstance(batch, SinglePathBatch):
        raise TrustRegionError(
            f"policy_closure() got a {type(batch).__name__}; it takes what single_path() returned. "
            "For a vine there is vine_closure()."
        )
    require_counts(micro_batch=micro_batch)
    if not math.isfinite(entropy_bonus):
        raise TrustRegionError(f"entropy_bonus is {entropy_bonus!r}; it must be a finite number.")
    if sampled and sampling_log_prob is not None:
        raise TrustRegionError(
            "sampled=True needs actions of the old policy, but sampling_log_prob says that another "
            "policy drew them. Leave out one of the two."
        )
    if process_group is not None and not standardise:
        raise TrustRegionError(
            "process_group is given and standardise is False. Only standardising needs the other "
            "ranks: pass standardise=True, or leave process_group out."
        )
    given = {"advantages": advantages, "weights": weights, "sampling_log_prob": sampling_log_prob}
    check = partial(_require_numbers, given, batch.valid)
    if standardise:
        advantages = standardised(advantages, batch.valid, check, process_group)
    else:
        check()
    select, count = (_rows if batch.state is None else _sequences)(policy, batch)

    def closure(part: _Part) -> Closure:
        return _closure(
            part,
            part.numbers(advantages),
            None if weights is None else part.numbers(weights),
            None if sampling_log_prob is None else part.numbers(sampling_log_prob),
            entropy_bonus,
            sampled=sampled,
        )

    pieces = [select(chosen) for chosen in torch.arange(count).split(micro_batch or count)]
    if curvature == "auto" and (sampled or batch.state is not None):
        curvature = None
    chosen = curvature_rows(curvature, count, generator, most=micro_batch)
    return Closures(
        parts=[closure(piece) for piece in pieces],
        weights=[float(piece.count) for piece in pieces],
        curvature=None if chosen is None else closure(select(chosen)),
    )


@dataclass(frozen=True)
class _Part:
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


def _rows(
    policy: Callable[..., Any], batch: SinglePathBatch
) -> tuple[Callable[[Tensor], _Part], int]:
    """Return what selects from the valid rows, and how many there are."""
    observations, actions = batch.flat(batch.observations), batch.flat(batch.actions)
    entries = batch.flat(batch.info)
    device, count = batch.rewards.device, int(batch.valid.sum())

    def select(chosen: Tensor) -> _Part:
        rows = slice(None) if len(chosen) == count else chosen.to(device)
        seen, said = mapped(lambda each: each[rows], (observations, entries))
        return _Part(
            evaluate=lambda: policy(seen, **said),
            actions=mapped(lambda each: each[rows], actions),
            mask=None,
            numbers=lambda values: values[batch.valid][rows],
            count=len(chosen),
        )

    return select, count


def _sequences(
    policy: Callable[..., Any], batch: SinglePathBatch
) -> tuple[Callable[[Tensor], _Part], int]:
    """Return what selects from the environments with valid rows, and how many there are."""
    device = batch.rewards.device
    used = batch.valid.any(0).nonzero().reshape(-1)

    def select(chosen: Tensor) -> _Part:
        columns = used[chosen.to(device)]

        def of_columns(values: Any) -> Any:
            return mapped(lambda each: each[:, columns], values)

        seen, state = of_columns(batch.observations), of_columns(batch.state)
        said = of_columns(batch.info)
        starts, mask = batch.starts[:, columns], batch.valid[:, columns]
        return _Part(
            evaluate=lambda: policy(seen, state, starts, **said)[0],
            actions=of_columns(batch.actions),
            mask=mask,
            numbers=lambda values: values[:, columns][mask],
            count=int(mask.sum()),
        )

    return select, len(used)


def _closure(
    part: _Part,
    advantages: Tensor,
    weights: Tensor | None,
    sampling_log_prob: Tensor | None,
    entropy_bonus: float,
    *,
    sampled: bool,
) -> Closure:
    """Return the closure on some rows, the policy as it is being the old one."""
    with torch.no_grad(), random_state_kept([advantages.device]):
        old = frozen(part.evaluate())
        old_log_prob = part.rows(log_prob(old, part.actions, part.mask))
        if old_log_prob.shape != advantages.shape:
            raise TrustRegionError(
                f"The policy's log-probabilities have shape {tuple(old_log_prob.shape)} and there "
                f"are {len(advantages)} rows. If the last dimension is the action's, return "
                "Independent(dist, 1) from the policy."
            )
    base = old_log_prob if sampling_log_prob is None else sampling_log_prob

    def closure() -> tuple[Tensor, Tensor, Any]:
        dist = part.evaluate()
        new_log_prob = part.rows(log_prob(dist, part.actions, part.mask))
        loss = surrogate(new_log_prob, base, advantages, weights=weights)
        if entropy_bonus:
            loss = loss - entropy_bonus * part.rows(entropy(dist)).mean()
        if sampled:
            return loss, sampled_kl(old_log_prob, new_log_prob, low_variance=True), new_log_prob
        return loss, joint_kl(old, dist, part.mask), dist

    return closure


def _require_numbers(given: Mapping[str, Tensor | None], valid: Tensor) -> None:
    """Check what is given for every row, by its name."""
    for name, value in given.items():
        if value is not None:
            _require_rows(name, value, valid)
    weights = given["weights"]
    if weights is not None and bool((weights[valid] < 0).any()):
        raise TrustRegionError(
            f"weights holds {float(weights[valid].min())}; a weight is a ratio of "
            "probabilities, which cannot be negative. See trajectory_weights()."
        )


def _require_rows(name: str, values: Tensor, valid: Tensor) -> None:
    """Check that there is a number for every valid row."""
    if values.shape != valid.shape:
        raise TrustRegionError(
            f"{name} has shape {tuple(values.shape)} and the batch {tuple(valid.shape)}: T steps "
            "of N environments. Give one number (advantage, Q, weight, …) per row."
        )
    if not valid.any():
        raise TrustRegionError("The batch is empty: no row is valid. Collect more steps.")
    bad = (~values.isfinite() & valid).nonzero()
    if len(bad):
        step, env = bad[0].tolist()
        raise TrustRegionError(
            f"{name} is {float(values[step, env])} at step {step} of environment {env}; it must be "
            "a number. Look at the rewards and at the critic."
        )
