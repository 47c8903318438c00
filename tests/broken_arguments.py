"""Policies whose distributions are made of the wrong numbers, or keep what they should not."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import torch
from broken import ACTIONS, OBSERVATIONS, Discrete, Policy
from torch import Tensor, nn
from torch.distributions import Bernoulli, Beta, Categorical, Independent, Normal


class RawScale(Policy):
    """The parameter itself is the standard deviation."""

    def __init__(self) -> None:
        super().__init__()
        self.std = nn.Parameter(torch.ones(ACTIONS))

    def dist(self, mean: Tensor, std: Tensor) -> Any:
        return super().dist(mean, self.std + 0 * std)


class RawOutput(Policy):
    """A layer gives the standard deviation."""

    def __init__(self) -> None:
        super().__init__(2 * ACTIONS)

    def dist(self, mean: Tensor, std: Tensor) -> Any:
        return Independent(Normal(mean[:, :ACTIONS], 3 + mean[:, ACTIONS:]), 1)


class RawConcentrations(RawOutput):
    """A layer gives the concentrations of a Beta."""

    def dist(self, mean: Tensor, std: Tensor) -> Any:
        return Independent(Beta(3 + mean[:, :ACTIONS], 3 + mean[:, ACTIONS:]), 1)


class Unvalidated(RawOutput):
    """A standard deviation that is negative already, and not looked at."""

    def dist(self, mean: Tensor, std: Tensor) -> Any:
        scale = mean[:, ACTIONS:] - 1
        return Independent(Normal(mean[:, :ACTIONS], scale, validate_args=False), 1)


class SoftmaxAsLogits(Discrete):
    def dist(self, mean: Tensor, std: Tensor) -> Any:
        return Categorical(logits=mean.softmax(-1))


class ShareAsLogits(Discrete):
    """A softmax by hand."""

    def dist(self, mean: Tensor, std: Tensor) -> Any:
        weights = mean.exp()
        return Categorical(logits=weights / weights.sum(-1, keepdim=True))


class SigmoidAsLogits(Discrete):
    def dist(self, mean: Tensor, std: Tensor) -> Any:
        return Independent(Bernoulli(logits=mean.sigmoid()), 1)


class ClampedAway(Policy):
    """A log-scale that starts above the clamp's upper bound."""

    def __init__(self, start: float = 3.0) -> None:
        super().__init__()
        nn.init.constant_(self.log_std[:2], start)

    def forward(self, observations: Tensor) -> Any:
        return self.dist(self.head(self.body(observations)), self.log_std.clamp(-5, 2).exp())


class ClampedOutput(RawOutput):
    """A layer gives a log-scale that is beyond the clamp at every observation."""

    def dist(self, mean: Tensor, std: Tensor) -> Any:
        log_std = nn.functional.hardtanh(mean[:, ACTIONS:] - 9, -5, 2)
        return Independent(Normal(mean[:, :ACTIONS], log_std.exp()), 1)


class CachedFeatures(Policy):
    """Features of the first observations serve for all."""

    def __init__(self) -> None:
        super().__init__()
        self.features: Tensor | None = None

    def forward(self, observations: Tensor) -> Any:
        if self.features is None:
            self.features = self.body(observations).detach()
        return self.dist(self.head(self.features), self.log_std.exp())


class CachedByObservation(Policy):
    """Features are looked up by the observations' content, whatever the parameters are."""

    def __init__(self) -> None:
        super().__init__()
        self.known: dict[bytes, Tensor] = {}

    def forward(self, observations: Tensor) -> Any:
        key = observations.detach().numpy().tobytes()
        if key not in self.known:
            self.known[key] = self.body(observations)
        return self.dist(self.head(self.known[key]), self.log_std.exp())


class StatisticsAsAttribute(Policy):
    """Every forward updates a running mean, which is no buffer."""

    def __init__(self) -> None:
        super().__init__()
        self.seen_mean = torch.zeros(OBSERVATIONS)

    def forward(self, observations: Tensor) -> Any:
        self.seen_mean = 0.9 * self.seen_mean + 0.1 * observations.mean(0)
        return super().forward(observations - self.seen_mean)


class StatisticsWithin(Policy):
    """The same in an object of one's own, and written in place."""

    def __init__(self) -> None:
        super().__init__()
        self.statistics = SimpleNamespace(mean=torch.zeros(OBSERVATIONS), count=0)

    def forward(self, observations: Tensor) -> Any:
        self.statistics.count += len(observations)
        self.statistics.mean.mul_(0.9).add_(0.1 * observations.mean(0).to(torch.float32))
        return super().forward(observations - self.statistics.mean)


class CumulativeStatistics(Policy):
    """A mean of all that was seen, which more of the same leaves where it is."""

    def __init__(self) -> None:
        super().__init__()
        self.seen_mean: Any = 0.0
        self.count = 0

    def forward(self, observations: Tensor) -> Any:
        self.count += len(observations)
        share = len(observations) / self.count
        self.seen_mean = self.seen_mean + share * (observations.mean(0) - self.seen_mean)
        return super().forward(observations - self.seen_mean)
