"""The objective that a step improves, estimated on actions that some policy drew."""

from __future__ import annotations

from torch import Tensor

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
        log_prob: ln π(a|s) under the new policy, with its graph, shape (B,).
        sampling_log_prob: ln q(a|s) under what drew the actions, usually the old policy; (B,).
        advantages: A(s, a) or Q(s, a), shape (B,).
        weights: What makes the states those of the old policy, where another visited them
            (``trajectory_weights``), shape (B,). None: it was the old policy.

    Returns:
        A scalar to be lowered.

    Raises:
        TrustRegionError: If shapes differ, there are no rows, or q, advantages or weights carry a
            graph.

    Source:
        Schulman et al. (2015), equation 14.
    """
    given = {"sampling_log_prob": sampling_log_prob, "advantages": advantages}
    if weights is not None:
        given["weights"] = weights
    for name, value in given.items():
        if value.shape != log_prob.shape:
            raise TrustRegionError(
                f"{name} has shape {tuple(value.shape)} and the log-probabilities "
                f"{tuple(log_prob.shape)}; one number per action in both."
            )
        if value.requires_grad:
            raise TrustRegionError(f"{name} carries a graph. Compute it under no_grad, before.")
    if log_prob.numel() == 0:
        raise TrustRegionError("There are no actions: the batch is empty.")
    terms = (log_prob - sampling_log_prob).exp() * advantages
    return -(terms if weights is None else weights * terms).mean()
