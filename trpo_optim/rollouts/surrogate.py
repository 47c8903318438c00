"""The objective that a step improves, estimated on actions that some policy drew."""

from __future__ import annotations

from torch import Tensor

from trpo_optim.distributions.arguments import require_beside
from trpo_optim.errors import TrustRegionError

__all__ = ["surrogate"]


def surrogate(
    log_prob: Tensor,
    sampling_log_prob: Tensor,
    advantages: Tensor,
    *,
    weights: Tensor | None = None,
) -> Tensor:
    """Return the surrogate loss, −mean(w · π(a|s)/q(a|s) · A).

    A is an advantage or Q: a baseline changes only the variance of the gradient.

    Args:
        log_prob: ln π(a|s) of the new policy, with its graph, shape (B,).
        sampling_log_prob: ln q(a|s) of the policy that drew the actions, usually the old policy,
            shape (B,).
        advantages: A(s, a) or Q(s, a), shape (B,).
        weights: Importance weights of the states if another policy visited them
            (``trajectory_weights``), shape (B,). None: the old policy visited them.

    Returns:
        A scalar to minimise.

    Raises:
        TrustRegionError: If shapes differ, there are no rows, or an argument other than
            ``log_prob`` requires grad.

    Example:
        >>> import torch
        >>> from trpo_optim.rollouts import surrogate
        >>> old = torch.tensor([0.5, 0.5]).log()
        >>> new = torch.tensor([0.25, 0.75]).log()
        >>> surrogate(new, old, advantages=torch.tensor([-1.0, 1.0]))
        tensor(-0.5000)

    Source:
        Schulman et al. (2015), equation 14.
    """
    given = {"sampling_log_prob": sampling_log_prob, "advantages": advantages}
    if weights is not None:
        given["weights"] = weights
    require_beside(log_prob, given, called="log-probabilities", unit="action")
    if log_prob.numel() == 0:
        raise TrustRegionError("The batch is empty. Pass at least one action.")
    terms = (log_prob - sampling_log_prob).exp() * advantages
    return -(terms if weights is None else weights * terms).mean()
