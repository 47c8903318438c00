"""What a step costs on networks where exact products are dear, and on compiled ones."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import torch
from memory import peak_bytes
from table import table
from timing import Job, taken_in_turn
from torch import Tensor, nn
from torch.distributions import Categorical, Distribution, Independent, Normal, kl_divergence

from trpo_optim import TrustRegionOptimizer
from trpo_optim.hyperparameters import EngineName

OBSERVATIONS, ACTIONS = 17, 6
RADIUS, DAMPING = 0.01, 0.1


class Recurrent(nn.Module):
    """A Gaussian policy with an LSTM of 128 units, on whole sequences."""

    def __init__(self) -> None:
        super().__init__()
        self.lstm, self.head = nn.LSTM(OBSERVATIONS, 128), nn.Linear(128, ACTIONS)
        self.log_std = nn.Parameter(torch.zeros(ACTIONS))

    def forward(self, observations: Tensor) -> Distribution:
        """Return the distribution over actions, from observations (T, N, 17)."""
        return Independent(Normal(self.head(self.lstm(observations)[0]), self.log_std.exp()), 1)


class Atari(nn.Module):
    """The paper's network for Atari: two convolutions of 16 channels and 20 hidden units."""

    def __init__(self) -> None:
        super().__init__()
        self.network = nn.Sequential(
            nn.Conv2d(4, 16, 4, stride=2),
            nn.ReLU(),
            nn.Conv2d(16, 16, 4, stride=2),
            nn.ReLU(),
            nn.Flatten(),
            nn.Linear(16 * 19 * 19, 20),
            nn.ReLU(),
            nn.Linear(20, ACTIONS),
        )

    def forward(self, observations: Tensor) -> Distribution:
        """Return the distribution over actions, from pictures (N, 4, 84, 84)."""
        return Categorical(logits=self.network(observations))


class Encoder(nn.Module):
    """A transformer encoder of two layers over 16 observations."""

    def __init__(self) -> None:
        super().__init__()
        layer = nn.TransformerEncoderLayer(64, 4, 128, dropout=0.0, batch_first=True)
        self.lift, self.encoder = nn.Linear(OBSERVATIONS, 64), nn.TransformerEncoder(layer, 2)
        self.head = nn.Linear(64, ACTIONS)

    def forward(self, observations: Tensor) -> Distribution:
        """Return the distribution over the actions of every step, from (N, 16, 17)."""
        return Categorical(logits=self.head(self.encoder(self.lift(observations))))


NETWORKS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "LSTM, 64 × 32 steps": (Recurrent, (64, 32, OBSERVATIONS)),
    "the paper's CNN, 128 pictures": (Atari, (128, 4, 84, 84)),
    "transformer encoder, 128 × 16 steps": (Encoder, (128, 16, OBSERVATIONS)),
}

ENGINES: dict[str, tuple[EngineName, bool]] = {
    "default": ("auto", True),
    "default without the third value": ("auto", False),
    "Gauss–Newton": ("Gauss-Newton", True),
    "torch.func": ("torch.func", False),
}
"""By column: the engine, and whether the closure returns the third value."""


class Step:
    """A policy on random observations, and the steps on it.

    Args:
        policy: Maps observations to a distribution.
        observations: Of the policy.
    """

    def __init__(self, policy: nn.Module, observations: Tensor) -> None:
        self._policy, self._observations = policy, observations
        with torch.no_grad():
            self._old = policy(observations)
            self._actions = self._old.sample()
            self._old_log_prob = self._old.log_prob(self._actions)
        self._advantages = torch.randn_like(self._old_log_prob)
        self._parameters = list(policy.parameters())
        self._start = [each.detach().clone() for each in self._parameters]

    def gradient(self) -> Job:
        """Evaluate the closure and differentiate its loss: the unit of all costs."""
        return Job(
            lambda: torch.autograd.grad(self._closure(third=False)[0], self._parameters),
            self._reset,
        )

    def update(self, engine: EngineName, *, third: bool) -> tuple[Job, TrustRegionOptimizer]:
        """Return a job that takes one step, and its optimizer."""
        optimizer = TrustRegionOptimizer(
            self._parameters, max_kl=RADIUS, damping=DAMPING, cg_tolerance=0.0, engine=engine
        )
        job = Job(lambda: optimizer.step(lambda: self._closure(third=third)), self._reset)
        return job, optimizer

    def _closure(self, *, third: bool) -> Any:
        dist = self._policy(self._observations)
        ratio = (dist.log_prob(self._actions) - self._old_log_prob).exp()
        pair = -(ratio * self._advantages).mean(), kl_divergence(self._old, dist).mean()
        return (*pair, dist) if third else pair

    def _reset(self) -> None:
        torch._foreach_copy_([each.detach() for each in self._parameters], self._start)


def networks(rounds: int, device: str) -> str:
    """Return the table of what an update costs by network and engine, in gradients.

    Args:
        rounds: Timed rounds.
        device: Where the policy is.
    """
    rows = [["network", "gradient (ms)", *ENGINES, "memory, default", "Gauss–Newton", "gain"]]
    for name, (make, shape) in NETWORKS.items():
        torch.manual_seed(0)
        step = Step(make().to(device), torch.rand(shape, device=device))
        made = {
            column: step.update(engine, third=third) for column, (engine, third) in ENGINES.items()
        }
        jobs = {"gradient": step.gradient()} | {column: job for column, (job, _) in made.items()}
        times = taken_in_turn(jobs, rounds, device)
        peaks, gains = {}, {}
        for column in ("gradient", "default", "Gauss–Newton"):
            jobs[column].prepare()
            peaks[column] = peak_bytes(jobs[column].run, device)
        for column, (_, optimizer) in made.items():
            report = optimizer.last_report
            assert report is not None
            gains[column] = report.improvement / report.kl**0.5
        rows.append(
            [
                name,
                f"{1000 * times['gradient'].median:.1f}",
                *(times[column].over(times["gradient"]) for column in ENGINES),
                *(f"{peaks[each] / peaks['gradient']:.1f}" for each in ("default", "Gauss–Newton")),
                f"{gains['default'] / gains['Gauss–Newton']:.4f}",
            ]
        )
    return table(*rows)


def compiled(rounds: int, device: str) -> str:
    """Return the table of what ``torch.compile`` gives, in steps that are not compiled.

    Args:
        rounds: Timed rounds.
        device: Where the policy is.
    """
    rows = [
        ["network", "not compiled (ms)", "compiled", "first step (s)", "first step, compiled (s)"]
    ]
    for name, (make, shape) in NETWORKS.items():
        if make is Recurrent:  # torch does not compile recurrence
            continue
        jobs: dict[str, Job] = {}
        seconds: dict[str, float] = {}
        for key in ("plain", "compiled"):
            torch.manual_seed(0)
            policy, observations = make().to(device), torch.rand(shape, device=device)
            step = Step(policy, observations)
            if key == "compiled":
                policy.compile()
            jobs[key], _ = step.update("auto", third=True)
            start = time.perf_counter()
            jobs[key].run()
            seconds[key] = time.perf_counter() - start
        times = taken_in_turn(jobs, rounds, device)
        rows.append(
            [
                name,
                f"{1000 * times['plain'].median:.1f}",
                times["compiled"].over(times["plain"]),
                *(f"{each:.1f}" for each in seconds.values()),
            ]
        )
    return table(*rows)
