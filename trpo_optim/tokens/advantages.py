"""Advantages of completions relative to the other completions of their prompt."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from trpo_optim.distributions.arguments import is_count, require_tensor
from trpo_optim.errors import TrustRegionError

__all__ = ["group_advantages"]


def group_advantages(
    rewards: Tensor, group_size: int, *, scale: Literal["std", "none"] = "std"
) -> Tensor:
    """Return each completion's reward minus the mean reward of its prompt's completions.

    Completions of one prompt whose rewards are all equal get 0.

    Args:
        rewards: One number per completion, shape (N,). The completions of a prompt lie side by
            side.
        group_size: The number of completions per prompt. It divides N.
        scale: ``"std"``: divide by the standard deviation of the prompt's rewards (GRPO). This is
            the root of the mean square, over ``group_size``. ``"none"``: do not divide (Dr. GRPO).

    Returns:
        One advantage per completion, shape (N,), in float32 at least.

    Raises:
        TrustRegionError: If shapes or sizes do not fit, a reward is not finite, or ``scale`` is
            something else.

    Example:
        >>> import torch
        >>> from trpo_optim.tokens import group_advantages
        >>> group_advantages(torch.tensor([1.0, 0.0, 3.0, 3.0]), group_size=2)
        tensor([ 1., -1.,  0.,  0.])

    Source:
        Shao et al., "DeepSeekMath" (2024), section 4.1, arXiv:2402.03300; Liu et al.,
        "Understanding R1-Zero-Like Training" (2025), arXiv:2503.20783.
    """
    if scale not in ("std", "none"):
        raise TrustRegionError(f"scale is {scale!r}; it must be 'std' or 'none'.")
    if not is_count(group_size, least=2):
        raise TrustRegionError(
            f"group_size is {group_size!r}; it must be a whole number of at least 2. A completion "
            "is compared with the other completions of its prompt."
        )
    require_tensor("rewards", rewards)
    if rewards.dim() != 1 or len(rewards) == 0 or len(rewards) % group_size:
        raise TrustRegionError(
            f"The rewards have shape {tuple(rewards.shape)} and group_size is {group_size}. Pass "
            "one reward per completion, shape (N,), where N is a multiple of group_size."
        )
    bad = (~rewards.isfinite()).nonzero()
    if len(bad):
        index = int(bad[0])
        raise TrustRegionError(
            f"The reward of completion {index} is {float(rewards[index])}; it must be a finite "
            "number."
        )
    dtype = torch.promote_types(torch.result_type(rewards, 1.0), torch.float32)
    groups = rewards.detach().cpu().double().view(-1, group_size)  # some devices have no double
    rest = groups - groups[:, :1]  # so that equal rewards have no deviation, not even by rounding
    advantages = rest - rest.mean(1, keepdim=True)
    if scale == "std":
        deviation = advantages.square().mean(1, keepdim=True).sqrt()
        single = torch.finfo(torch.float32).eps  # coarser rewards are taken as they are
        rounding = (
            min(torch.finfo(rewards.dtype).eps, single) if rewards.is_floating_point() else 0.0
        )
        differ = deviation > 4 * rounding * groups.abs().amax(1, keepdim=True)
        advantages = torch.where(differ, advantages / deviation, 0.0)
    return advantages.flatten().to(rewards.device, dtype)
