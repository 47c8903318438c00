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

    Use it for policies whose KL has no closed form, such as mixtures and normalising flows. With
    r = π_new/π_old, the plain estimator is the mean of −ln r. The low-variance estimator is the
    mean of r − 1 − ln r. Both are unbiased, since r has the mean 1 under the old policy.

    The KL of a small step is about var(ln r)/2. The plain estimator has standard deviation
    √(2 KL/N) and may be negative; a negative trial counts as within the radius. The low-variance
    estimator is never negative. Its variance is of higher order in the step, but it is heavy-tailed
    if r is far from 1.

    Both estimators have the derivatives of r − 1 − ln r. Where old and new policy are equal, its
    Hessian is the Fisher matrix by the score, the batch mean of ∇ln π ∇ln πᵀ. This is positive
    semi-definite on any sample, unlike the Hessian of −ln r.

    Args:
        old_log_prob: ln π_old of the batch's actions, without a graph.
        new_log_prob: ln π_new of the same actions. Return it as the closure's third value, too.
        mask: True where an element counts, in the same shape. None: all count.
        low_variance: Whether to use r − 1 − ln r.
        per: What the mean is over, as for ``mean_kl``. The KL of a sequence is the sum over its
            tokens.

    Returns:
        A scalar.

    Raises:
        TrustRegionError: If the shapes differ, the old log-probabilities require grad, or the mask
            or ``per`` does not fit.

    Example:
        >>> import torch
        >>> from torch.distributions import Normal
        >>> from trpo_optim import sampled_kl
        >>> actions = torch.randn(10_000, generator=torch.Generator().manual_seed(0))
        >>> old, new = (Normal(mean, 1.0).log_prob(actions) for mean in (0.0, 0.1))
        >>> abs(sampled_kl(old, new, low_variance=True).item() - 0.005) < 0.0005  # 0.1² / 2
        True

    Source:
        Schulman, "Approximating KL divergence" (2020), joschu.net/blog/kl-approx.html.
    """
    require_per(per)
    if old_log_prob.shape != new_log_prob.shape:
        raise TrustRegionError(
            f"The old log-probabilities have shape {tuple(old_log_prob.shape)} and the new ones "
            f"{tuple(new_log_prob.shape)}. Compute both for the same actions, one number per "
            "action."
        )
    if old_log_prob.requires_grad:
        raise TrustRegionError(
            "The old log-probabilities require grad. Compute them under no_grad before the step, "
            "and pass them first, the new ones second."
        )
    counted = checked_mask(mask)
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
