"""The KL estimated on actions that the old policy drew."""

from __future__ import annotations

import torch
from torch import Tensor

from trpo_optim.distributions.masks import Per, checked_mask, masked_mean, require_per
from trpo_optim.distributions.precision import widened
from trpo_optim.errors import TrustRegionError

__all__ = ["sampled_kl"]


def sampled_kl(
    old_log_prob: Tensor,
    new_log_prob: Tensor,
    mask: Tensor | None = None,
    *,
    low_variance: bool = False,
    per: Per = "token",
) -> Tensor:
    """Estimate the batch mean of KL(old ‖ new) on actions that the old policy drew, in nats.

    For policies whose KL has no closed form: mixtures, normalising flows. With r = π_new/π_old, the
    plain estimator is the mean of −ln r; the other one the mean of r − 1 − ln r. Both are without
    bias, since r has the mean 1 under the old policy. A small step's KL is about var(ln r)/2, which
    the plain one estimates with standard deviation √(2 KL/N): it may come out negative, which
    counts as within the radius. The other one is never negative and its variance of higher order in
    the step, but it is heavy-tailed once r is far from 1.

    The derivatives of either are those of r − 1 − ln r. Its Hessian where both policies are one is
    the Fisher matrix by the score, the mean of ∇ln π ∇ln πᵀ over the batch: positive
    semi-definite whatever the sample, which the plain estimator's own Hessian is not.

    Args:
        old_log_prob: ln π_old of the batch's actions, without a graph.
        new_log_prob: ln π_new of the same; best returned as the closure's third value, too.
        mask: True where an element counts, of the same shape. None: all count.
        low_variance: Whether to take r − 1 − ln r.
        per: What the mean is over, as for ``mean_kl``: a sequence's KL is the sum over its tokens.

    Returns:
        A scalar.

    Raises:
        TrustRegionError: If the shapes differ, the old ones carry a graph, or the mask or ``per``
            does not fit.

    Source:
        Schulman, "Approximating KL divergence" (2020), joschu.net/blog/kl-approx.html.
    """
    require_per(per)
    if old_log_prob.shape != new_log_prob.shape:
        raise TrustRegionError(
            f"The old log-probabilities have shape {tuple(old_log_prob.shape)} and the new ones "
            f"{tuple(new_log_prob.shape)}. Take both of the same actions, one number for each."
        )
    if old_log_prob.requires_grad:
        raise TrustRegionError(
            "The old log-probabilities carry a graph. Compute them under no_grad before the step, "
            "and pass them first, the new ones second."
        )
    counted = None if mask is None else checked_mask(mask)
    old_log_prob, new_log_prob = (
        widened(each, torch.float32) for each in (old_log_prob, new_log_prob)
    )
    log_ratio = new_log_prob - old_log_prob
    if counted is not None and counted.shape == log_ratio.shape:
        log_ratio = log_ratio.masked_fill(~counted, 0)  # padding may be infinite, its slope not
    excess = masked_mean(torch.expm1(log_ratio) - log_ratio, counted, per)
    if low_variance:
        return excess
    slope_alone = (excess - excess.detach()).nan_to_num(0.0)  # far away, the exponential overflows
    return masked_mean(-log_ratio, counted, per).detach() + slope_alone
