"""The paper's two estimators on a vine, as the optimizer's closure."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from trpo_optim.closure.closures import Closures
from trpo_optim.closure.evaluation import Closure
from trpo_optim.closure.random_state import random_state_kept
from trpo_optim.distributions import entropy, frozen, joint_kl
from trpo_optim.distributions.nesting import mapped
from trpo_optim.errors import TrustRegionError
from trpo_optim.rollouts.branch_actions import log_probs
from trpo_optim.rollouts.policy_closure import curvature_rows
from trpo_optim.rollouts.vine import VineBatch

__all__ = ["vine_closure"]


def vine_closure(
    policy: Callable[..., Any],
    batch: VineBatch,
    *,
    entropy_bonus: float = 0.0,
    curvature: float | None = None,
    generator: torch.Generator | None = None,
) -> Closures:
    """Return what ``optimizer.step`` takes for one step on a vine.

    The loss is that of the rollout set: where every action was tried, −mean Σ π(a|s) Q(s, a);
    otherwise the self-normalised −mean Σ r Q / Σ r with r = π(a|s)/q(a|s). Neither changes with
    what is added to the Q of a state. The old policy is the policy as it is at this call, which
    leaves the random state alone: a step that follows at once sees the same dropout masks. The KL
    is one per sample, over all states of the trunk; the distribution there is the third value.

    Args:
        policy: What collected the batch.
        batch: What ``vine`` returned.
        entropy_bonus: What a nat of the mean entropy is worth, in units of Q.
        curvature: The share of the trunk's states that Fisher-vector products are taken on, in
            (0, 1). None: all.
        generator: Draws that share; None: torch's global one.

    Returns:
        What ``step`` takes in place of a closure. Between ranks it is weighed, the KL too, by the
        number of states with branches: let that be the same share of the trunk on all.

    Raises:
        TrustRegionError: If the batch is empty, a Q is not finite, the policy has other actions
            than those that were all tried, or rules out all that were, or curvature is outside its
            range.

    Source:
        Schulman et al. (2015), equations 15 and 16.
    """
    if not isinstance(batch, VineBatch):
        raise TrustRegionError(
            f"vine_closure() got a {type(batch).__name__}; it takes what vine() returned. For "
            "trajectories there is policy_closure()."
        )
    rows = curvature_rows(curvature, int(batch.trunk.valid.sum()), generator)
    if batch.q.numel() == 0:
        raise TrustRegionError("The vine is empty: no state has branches.")
    trunk = batch.trunk.flat((batch.trunk.observations, batch.trunk.info))

    def rollout_set() -> Any:
        return policy(batch.observations, **batch.info)

    with torch.no_grad(), random_state_kept([batch.q.device]):
        start = log_probs(rollout_set(), batch.actions)
    allowed = start.exp() > 0
    untried = batch.q.isnan() & ~allowed
    if not batch.q[~untried].isfinite().all():
        raise TrustRegionError(
            "The vine's Q holds NaN or infinity. Look at rewards and critic. If the policy allows "
            "actions that the one that collected the vine ruled out, pass that one."
        )
    if batch.sampling_log_prob is None and not torch.allclose(
        start.exp().sum(1), torch.ones_like(start[:, 0]), atol=1e-3
    ):
        raise TrustRegionError(
            "The policy's probabilities of all actions of the space do not sum to 1: its "
            f"distribution has others than the {batch.q.shape[1]} that were tried."
        )
    if not bool(allowed.any(1).all()):
        raise TrustRegionError(
            "In some states the policy rules out all the actions that were tried: none of their Q "
            "can be weighed. Draw them by the policy (sampling='policy'), or try all of them."
        )
    base = start if batch.sampling_log_prob is None else batch.sampling_log_prob
    shares = start.softmax(1) if batch.sampling_log_prob is None else (start - base).softmax(1)
    # With advantages in place of Q the loss begins at zero, or near it with dropout.
    q = batch.q.masked_fill(untried, 0.0)
    advantages = (q - (shares * q).sum(1, keepdim=True)).masked_fill(untried, 0.0)

    def closure_on(seen: Any, said: dict[str, Any]) -> Closure:
        with torch.no_grad(), random_state_kept([batch.q.device]):
            old = frozen(policy(seen, **said))

        def closure() -> tuple[Tensor, Tensor, Any]:
            new = policy(seen, **said)  # first, so that it draws the old one's dropout masks
            dist = rollout_set()
            logs = log_probs(dist, batch.actions)
            if batch.sampling_log_prob is None:
                loss = -(logs.exp() * advantages).sum(1).mean()
            else:
                loss = -((logs - base).softmax(1) * advantages).sum(1).mean()
            if entropy_bonus:
                loss = loss - entropy_bonus * entropy(dist).mean()
            return loss, joint_kl(old, new), new

        return closure

    part = None
    if rows is not None:
        part = closure_on(*mapped(lambda each: each[rows.to(each.device)], trunk))
    return Closures([closure_on(*trunk)], weights=[float(len(batch.q))], curvature=part)
