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
from trpo_optim.rollouts.curvature_rows import CurvatureShare, curvature_rows
from trpo_optim.rollouts.spaces import evaluated
from trpo_optim.rollouts.vine import VineBatch

__all__ = ["vine_closure"]


def vine_closure(
    policy: Callable[..., Any],
    batch: VineBatch,
    *,
    entropy_bonus: float = 0.0,
    curvature: CurvatureShare = "auto",
    generator: torch.Generator | None = None,
) -> Closures:
    """Return the closures for one ``optimizer.step`` on a vine.

    If every action was tried, the loss is −mean Σ π(a|s) Q(s, a). Otherwise it is the
    self-normalised −mean Σ r Q / Σ r with r = π(a|s)/q(a|s). Adding a constant to the Q of a state
    changes neither. The KL is one per sample, over all states of the trunk. The distribution there
    is the third value.

    The old policy is the policy at this call. The call does not change the random state, so a step
    right after it sees the same dropout masks.

    Args:
        policy: The policy that collected the batch.
        batch: The batch that ``vine`` returned.
        entropy_bonus: The weight of the mean entropy, in units of Q per nat.
        curvature: Which states of the trunk Fisher-vector products are taken on. ``"auto"``: as
            many random states as they need, such as 1365 of 2048 and 2731 of 8192. A share in
            (0, 1): this share of the states. None: all states.
        generator: The generator that draws these states. None: for ``"auto"``, a generator with a
            fixed seed, the same states in every call with as many; for a share, torch's global
            generator.

    Returns:
        The closures. With a process group, the number of states with branches weighs the ranks, for
        the KL too. Keep it the same share of the trunk on all ranks.

    Raises:
        TrustRegionError: If the batch is empty, a Q is not finite, the policy has actions that were
            not tried, the policy rules out all actions that were tried, or ``curvature`` is outside
            its range.

    Example:
        >>> import gymnasium as gym, torch
        >>> from torch.distributions import Categorical
        >>> from trpo_optim import TrustRegionOptimizer
        >>> from trpo_optim.rollouts import vine, vine_closure
        >>> envs = gym.vector.SyncVectorEnv([lambda: gym.make("CartPole-v1")] * 2)
        >>> network = torch.nn.Linear(4, 2)
        >>> policy = lambda observations: Categorical(logits=network(observations))
        >>> batch = vine(envs, policy, steps=32, states=8, horizon=32, gamma=0.99)
        >>> report = TrustRegionOptimizer(network.parameters()).step(vine_closure(policy, batch))
        >>> report.kl <= 0.01
        True

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
        raise TrustRegionError("The vine is empty: no state has branches. Collect another one.")
    trunk = batch.trunk.flat((batch.trunk.observations, batch.trunk.info))

    def rollout_set() -> Any:
        return evaluated(policy, batch.observations, info=batch.info)

    with torch.no_grad(), random_state_kept([batch.q.device]):
        start = log_probs(rollout_set(), batch.actions)
    allowed = start.exp() > 0
    untried = batch.q.isnan() & ~allowed
    if not batch.q[~untried].isfinite().all():
        raise TrustRegionError(
            "The vine's Q holds NaN or infinity. Look at the rewards and the critic. If this "
            "policy allows actions that the collecting policy ruled out, pass the collecting "
            "policy."
        )
    if batch.sampling_log_prob is None and not torch.allclose(
        start.exp().sum(1), torch.ones_like(start[:, 0]), atol=1e-3
    ):
        raise TrustRegionError(
            "The policy's probabilities of all actions of the space do not sum to 1. Its "
            f"distribution must have the {batch.q.shape[1]} actions that were tried, and no others."
        )
    if not bool(allowed.any(1).all()):
        raise TrustRegionError(
            "In some states the policy rules out all actions that were tried, so their Q has no "
            "weight. Draw actions from the policy (sampling='policy'), or try all actions."
        )
    base = start if batch.sampling_log_prob is None else batch.sampling_log_prob
    shares = start.softmax(1) if batch.sampling_log_prob is None else (start - base).softmax(1)
    # With advantages in place of Q the loss begins at zero, or near it with dropout.
    q = batch.q.masked_fill(untried, 0.0)
    advantages = (q - (shares * q).sum(1, keepdim=True)).masked_fill(untried, 0.0)

    def closure_on(seen: Any, said: dict[str, Any]) -> Closure:
        with torch.no_grad(), random_state_kept([batch.q.device]):
            old = frozen(evaluated(policy, seen, info=said))

        def closure() -> tuple[Tensor, Tensor, Any]:
            new = evaluated(
                policy, seen, info=said
            )  # first, so that it draws the old one's dropout masks
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
