"""KL divergences with one fault each."""

from __future__ import annotations

from typing import Any

import torch
from broken import Custom
from torch import Tensor, nn
from torch.autograd import Function
from torch.autograd.function import once_differentiable
from torch.distributions import (
    Independent,
    Laplace,
    kl_divergence,
)


def custom_kl(old: Any, new: Any) -> Any:
    return kl_divergence(old.gaussian(), new.gaussian()).mean()


class HandmadeLaplace(Custom):
    """A Laplace, whose KL is written out below."""

    def gaussian(self) -> Any:
        return Independent(Laplace(self.mean_, self.std_), 1)


def handmade_laplace_kl(old: Any, new: Any) -> Any:
    """Return the KL of two Laplaces, whose second derivative autograd takes for zero."""
    ratio = old.std_ / new.std_
    shift = (new.mean_ - old.mean_).abs() / old.std_
    return (ratio * (shift + (-shift).exp()) - 1 - ratio.log()).sum(-1).mean()


class WrongSecond(Function):
    """tanh with the right first derivative, of which the second is lost."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.slope = 1 - x.tanh().square()
        return x.tanh()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        slope: Tensor = ctx.slope
        return grads[0] * slope


class Once(WrongSecond):
    """tanh whose backward forbids a second one."""

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        slope: Tensor = ctx.slope
        return grads[0] * slope


class Applied(nn.Module):
    def __init__(self, function: type[Function]) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.function.apply(x)
        return result


class OnceInHalf(Applied):
    """The tanh that forbids a second backward, in bfloat16 alone."""

    def __init__(self) -> None:
        super().__init__(Once)

    def forward(self, x: Tensor) -> Tensor:
        if x.dtype != torch.bfloat16:
            raise TypeError("bfloat16 alone")
        return super().forward(x)


class WrongSecondInKl(Function):
    """Half a square whose second derivative is doubled, in a KL written by hand."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return 0.5 * x.square()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        (x,) = ctx.saved_tensors
        return grads[0] * (2 * x - x.detach())


def kl_with_wrong_second(old: Any, new: Any) -> Any:
    shift = (new.base_dist.loc - old.base_dist.loc) / old.base_dist.scale
    ratio = new.base_dist.scale / old.base_dist.scale
    exact = kl_divergence(old, new) - 0.5 * (shift / ratio).square().sum(-1)
    halved: Any = WrongSecondInKl
    halves: Tensor = halved.apply(shift / ratio)
    return (exact + halves.sum(-1)).mean()


def mean_over_dimensions(old: Any, new: Any) -> Any:
    return kl_divergence(old.base_dist, new.base_dist).mean()


def clamped(old: Any, new: Any) -> Any:
    return kl_divergence(old, new).mean().clamp(max=0.02)


def unweighted(old: Any, new: Any) -> Any:
    return (old.logits - new.logits).mean(-1).mean()


def with_entropy(old: Any, new: Any) -> Any:
    return kl_divergence(old, new).mean() + 2e-6 * new.entropy().mean()


def rooted(old: Any, new: Any) -> Any:
    return kl_divergence(old, new).mean().clamp_min(1e-12).sqrt()


def negative(old: Any, new: Any) -> Any:
    return -kl_divergence(old, new).mean()


def unjoint(old: Any, new: Any) -> Any:
    return kl_divergence(old, new).mean()
