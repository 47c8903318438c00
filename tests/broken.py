"""Policies with one fault each."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributions import (
    Categorical,
    Distribution,
    Independent,
    Normal,
    constraints,
)

OBSERVATIONS, ACTIONS, SAMPLES = 5, 3, 128
NO_SHAPE = torch.Size()


class Policy(nn.Module):
    """A sound Gaussian policy, for faults to be put into."""

    def __init__(self, actions: int = ACTIONS, middle: nn.Module | None = None) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(OBSERVATIONS, 8), nn.Tanh(), middle or nn.Identity())
        self.head = nn.Linear(8, actions)
        self.log_std = nn.Parameter(torch.full((actions,), -0.3))

    def forward(self, observations: Tensor) -> Any:
        return self.dist(self.head(self.body(observations)), self.log_std.exp())

    def dist(self, mean: Tensor, std: Tensor) -> Any:
        return Independent(Normal(mean, std), 1)


class Discrete(Policy):
    """A sound categorical policy."""

    def dist(self, mean: Tensor, std: Tensor) -> Any:
        return Categorical(logits=mean)


class OneNumber(Policy):
    def dist(self, mean: Tensor, std: Tensor) -> Any:
        return Normal(mean, std)


class Noisy(Policy):
    def dist(self, mean: Tensor, std: Tensor) -> Any:
        return super().dist(mean + 0.1 * torch.randn_like(mean), std)


class NoisyTogether(Policy):
    def dist(self, mean: Tensor, std: Tensor) -> Any:
        return super().dist(mean + 0.1 * torch.randn(()), std)


class Centred(Policy):
    def forward(self, observations: Tensor) -> Any:
        return super().forward(observations - observations.mean(0))


class SoftmaxOverTheBatch(Discrete):
    def dist(self, mean: Tensor, std: Tensor) -> Any:
        return Categorical(probs=mean.softmax(0))


class Counting(Policy):
    count: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("count", torch.zeros(()))

    def forward(self, observations: Tensor) -> Any:
        self.count += len(observations)
        return super().forward(observations)


class WritingObservations(Policy):
    def forward(self, observations: Tensor) -> Any:
        return super().forward(observations.clamp_(-1.0, 1.0))


class ClampingItself(Policy):
    def forward(self, observations: Tensor) -> Any:
        with torch.no_grad():
            self.log_std.clamp_(-0.2, 2.0)
        return super().forward(observations)


class LayersInAList(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = [nn.Linear(OBSERVATIONS, 8), nn.Linear(8, ACTIONS)]
        self.log_std = nn.Parameter(torch.zeros(ACTIONS))

    def forward(self, observations: Tensor) -> Any:
        mean = self.layers[1](self.layers[0](observations).tanh())
        return Independent(Normal(mean, self.log_std.exp()), 1)


class Squeezed(Discrete):
    def dist(self, mean: Tensor, std: Tensor) -> Any:
        return Categorical(logits=mean.squeeze())


class DetachedBody(Policy):
    def forward(self, observations: Tensor) -> Any:
        return self.dist(self.head(self.body(observations).detach()), self.log_std.exp())


class ScaleAsNumber(Policy):
    def dist(self, mean: Tensor, std: Tensor) -> Any:
        return super().dist(mean, std.mean().item() * torch.ones_like(mean))


class WithoutGraph(Policy):
    @torch.no_grad()
    def forward(self, observations: Tensor) -> Any:
        return super().forward(observations)


class Normalised(Policy):
    def forward(self, observations: Tensor) -> Any:
        return super().forward(observations / observations.norm(dim=-1, keepdim=True))


class Squashed(Distribution):
    """A tanh-squashed Gaussian whose log_prob forgets the squashing."""

    arg_constraints = {}  # noqa: RUF012  # torch declares it so
    support = constraints.independent(constraints.interval(-1.0, 1.0), 1)

    def __init__(self, base: Any) -> None:
        self.base = base
        super().__init__(base.batch_shape, base.event_shape, validate_args=False)

    def sample(self, sample_shape: Any = NO_SHAPE) -> Tensor:
        result: Tensor = self.base.sample(sample_shape).tanh()
        return result

    def log_prob(self, value: Tensor) -> Tensor:
        result: Tensor = self.base.log_prob(value.atanh())
        return result


class Custom(Distribution):
    """A Gaussian written by hand; faults go into its methods."""

    arg_constraints = {}  # noqa: RUF012  # torch declares it so
    support = constraints.real_vector

    def __init__(self, mean: Tensor, std: Tensor) -> None:
        self.mean_, self.std_ = mean, std.expand_as(mean)
        super().__init__(mean.shape[:-1], mean.shape[-1:], validate_args=False)

    def gaussian(self) -> Any:
        return Independent(Normal(self.mean_, self.std_), 1)

    def sample(self, sample_shape: Any = NO_SHAPE) -> Tensor:
        result: Tensor = self.gaussian().sample(sample_shape)
        return result

    def log_prob(self, value: Tensor) -> Tensor:
        result: Tensor = self.gaussian().log_prob(value)
        return result


class WithoutConstant(Custom):
    def log_prob(self, value: Tensor) -> Tensor:
        return -0.5 * ((value - self.mean_) / self.std_).square().sum(-1) - self.std_.log().sum(-1)


class DensityNotLog(Custom):
    def log_prob(self, value: Tensor) -> Tensor:
        return super().log_prob(value).exp()


class Hotter(Custom):
    def sample(self, sample_shape: Any = NO_SHAPE) -> Tensor:
        result: Tensor = Normal(self.mean_, 1.2 * self.std_).sample(sample_shape)
        return result


class Clipped(Custom):
    def sample(self, sample_shape: Any = NO_SHAPE) -> Tensor:
        return super().sample(sample_shape).clamp(-1.0, 1.0)


class EntropyOverDimensions(Custom):
    def entropy(self) -> Tensor:
        result: Tensor = self.gaussian().base_dist.entropy().mean(-1)
        return result


class DetachedScale(Custom):
    def log_prob(self, value: Tensor) -> Tensor:
        result: Tensor = Independent(Normal(self.mean_, self.std_.detach()), 1).log_prob(value)
        return result


class EpsilonGreedy(Categorical):
    def sample(self, sample_shape: Any = NO_SHAPE) -> Tensor:
        action: Tensor = Categorical(logits=self.logits).sample(sample_shape)
        return torch.where(torch.rand(action.shape) < 0.2, torch.zeros_like(action), action)


def policy_of(kind: Callable[[Tensor, Tensor], Any]) -> Callable[[], nn.Module]:
    """Return a policy whose distribution is made by a function of mean and scale."""

    class Made(Policy):
        def dist(self, mean: Tensor, std: Tensor) -> Any:
            return kind(mean, std)

    return Made


class Bag(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.bag = nn.EmbeddingBag(10, 4)

    def forward(self, tokens: Tensor) -> Any:
        return Categorical(logits=self.bag(tokens))


class GradMode(Policy):
    def dist(self, mean: Tensor, std: Tensor) -> Any:
        return super().dist(mean, std if torch.is_grad_enabled() else 0.9 * std.detach() + 0.05)


class Rounded(Policy):
    def dist(self, mean: Tensor, std: Tensor) -> Any:
        coarse = (10 * mean).round() / 10
        return super().dist(mean + (coarse - mean).detach(), std)
