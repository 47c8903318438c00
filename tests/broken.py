"""Policies and closures with one fault each, and the check that is meant for it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from problems import Problem, categorical, gaussian
from torch import Tensor, nn
from torch.autograd import Function
from torch.autograd.function import once_differentiable
from torch.distributions import (
    Categorical,
    Distribution,
    Independent,
    Laplace,
    Normal,
    constraints,
    kl_divergence,
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


@dataclass(frozen=True)
class Broken:
    """A fault: what makes it, the check that is meant for it, and part of what that says."""

    make: Callable[[], Any]
    check: str
    says: str
    observations: Callable[[], Tensor] = lambda: torch.randn(SAMPLES, OBSERVATIONS)
    options: dict[str, Any] = field(default_factory=dict)


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


BROKEN_POLICIES: dict[str, Broken] = {
    "one action dimension, not joint": Broken(
        lambda: OneNumber(1),
        "one action per row",
        r"batch shape \(128, 1\)",
        options={"kl": unjoint},
    ),
    "action dimensions not joint": Broken(
        OneNumber, "one action per row", "gives 3 numbers per observation.*Independent"
    ),
    "dropout": Broken(lambda: Policy(middle=nn.Dropout(0.2)), "deterministic", "dropout.*eval"),
    "noise in forward": Broken(Noisy, "deterministic", "draws random numbers"),
    "one random number for all rows": Broken(
        NoisyTogether, "deterministic", "draws random numbers"
    ),
    "a counter in forward": Broken(Counting, "state", "changes count"),
    "observations clamped in place": Broken(
        WritingObservations, "state", "changes observations.*write to no tensor in place"
    ),
    "a parameter clamped in forward": Broken(ClampingItself, "state", "changes log_std"),
    "a squeeze() without a dimension": Broken(Squeezed, "rows", "changes by inf nats"),
    "batch normalisation": Broken(
        lambda: Policy(middle=nn.BatchNorm1d(8)), "rows", "batch normalisation in training mode"
    ),
    "the batch's mean subtracted": Broken(Centred, "rows", "a mean or softmax over the wrong dim"),
    "softmax over the batch": Broken(SoftmaxOverTheBatch, "rows", "across the batch"),
    "a detached body": Broken(DetachedBody, "parameters", r"depends on body\.0\.weight.*detached"),
    "a scale made a number": Broken(ScaleAsNumber, "parameters", "depends on log_std"),
    "layers in a list": Broken(
        LayersInAList, "parameters", r"depends on 4 tensors that .*nn\.ModuleList"
    ),
    "no graph": Broken(WithoutGraph, "parameters", "detached on the way"),
    "division by the observation's norm": Broken(Normalised, "finite", "observations of zeros"),
    "squashing without its log-determinant": Broken(
        policy_of(lambda mean, std: Squashed(Independent(Normal(mean, std), 1))),
        "density",
        "log-determinant",
        options={"kl": lambda old, new: kl_divergence(old.base, new.base).mean()},
    ),
    "log_prob without its constant": Broken(
        policy_of(WithoutConstant), "density", "integrates to 15", options={"kl": custom_kl}
    ),
    "a density for log_prob": Broken(
        policy_of(DensityNotLog), "density", "integrates to", options={"kl": custom_kl}
    ),
    "a hotter sampler": Broken(
        policy_of(Hotter),
        "sampler",
        "differ from those that its log_prob",
        options={"kl": custom_kl},
    ),
    "a sampler that clips": Broken(
        policy_of(Clipped), "sampler", "clip, round or mask.*outside", options={"kl": custom_kl}
    ),
    "an epsilon-greedy sampler": Broken(
        policy_of(lambda mean, std: EpsilonGreedy(logits=mean)), "sampler", "EpsilonGreedy"
    ),
    "entropy averaged over dimensions": Broken(
        policy_of(EntropyOverDimensions), "entropy", r"mean of -log_prob", options={"kl": custom_kl}
    ),
    "a scale detached in log_prob": Broken(
        policy_of(DetachedScale), "score", "part of log_prob is detached", options={"kl": custom_kl}
    ),
    "rounding, straight through": Broken(Rounded, "score", "not its slope"),
    "entropy in the KL": Broken(
        Policy, "zero kl", r"KL\(old \|\| old\) is .* not zero", options={"kl": with_entropy}
    ),
    "the root of the KL": Broken(Policy, "zero kl", "not zero", options={"kl": rooted}),
    "the KL's negative": Broken(Policy, "zero kl", "does not rise", options={"kl": negative}),
    "KL averaged over dimensions": Broken(
        Policy,
        "kl",
        "averaged over the action's 3 dimensions",
        options={"kl": mean_over_dimensions},
    ),
    "a clamped KL": Broken(Policy, "kl", "not the KL of these", options={"kl": clamped}),
    "a KL not weighted by probabilities": Broken(
        Discrete, "kl", "not the KL of these|sign", options={"kl": unweighted}
    ),
    "an embedding bag": Broken(
        Bag,
        "second order",
        "EmbeddingBag has no second derivatives.*nn.Embedding",
        observations=lambda: torch.randint(10, (SAMPLES, 4)),
    ),
    "a backward that forbids a second": Broken(
        lambda: Policy(middle=Applied(Once)), "second order", "once_differentiable"
    ),
    "a KL with a wrong second derivative": Broken(
        Policy,
        "fisher",
        "by differences of the KL's gradient it is",
        options={"kl": kl_with_wrong_second},
    ),
    "a KL with a kink": Broken(
        policy_of(HandmadeLaplace),
        "fisher",
        "by torch.func, and by differences",
        options={"kl": handmade_laplace_kl},
    ),
    "another policy without gradients": Broken(GradMode, "step", "is_grad_enabled"),
}


@dataclass(frozen=True)
class BrokenClosure:
    """A closure with a fault, for a problem whose old policy is the present one."""

    make: Callable[[Problem], Callable[[], Any]]
    check: str
    says: str
    problem: Callable[[], Problem] = gaussian
    options: Callable[[Problem], dict[str, Any]] = lambda problem: {}


def altered(change: Callable[[Tensor, Tensor], Any]) -> Callable[[Problem], Callable[[], Any]]:
    """Return a closure whose two values go through a function."""
    return lambda problem: lambda: change(*problem.closure())


def on_random_rows(problem: Problem) -> Callable[[], Any]:
    def closure() -> Any:
        rows = torch.randint(len(problem.advantages), (16,))
        dist = problem.policy(problem.observations)
        ratio = (dist.log_prob(problem.actions) - problem.old_log_prob).exp()
        return -(ratio * problem.advantages)[rows].mean(), problem.closure()[1]

    return closure


def with_backward(problem: Problem) -> Callable[[], Any]:
    def closure() -> Any:
        loss, kl = problem.closure()
        loss.backward(retain_graph=True)
        return loss, kl

    return closure


def old_not_detached(problem: Problem) -> Callable[[], Any]:
    with torch.enable_grad():
        old = problem.policy(problem.observations)
        old_log_prob = old.log_prob(problem.actions)

    def closure() -> Any:
        dist = problem.policy(problem.observations)
        ratio = (dist.log_prob(problem.actions) - old_log_prob).exp()
        return -(ratio * problem.advantages).mean(), kl_divergence(old, dist).mean()

    return closure


def old_made_inside(problem: Problem) -> Callable[[], Any]:
    def closure() -> Any:
        with torch.no_grad():
            old = problem.policy(problem.observations)
        return problem.closure()[0], kl_divergence(old, problem.policy(problem.observations)).mean()

    return closure


def old_of_other_weights(problem: Problem) -> Callable[[], Any]:
    with torch.no_grad():
        for each in problem.parameters():
            each.add_(0.2)
    return problem.closure


class OwnScale(nn.Module):
    """A policy whose scale is the parameter itself."""

    def __init__(self) -> None:
        super().__init__()
        self.mean = nn.Linear(4, 2).double()
        self.scale = nn.Parameter(torch.ones(2, dtype=torch.float64))

    def forward(self, observations: Tensor) -> Distribution:
        mean = self.mean(observations)
        return Independent(Normal(mean, self.scale.expand_as(mean)), 1)


def own_scale() -> Problem:
    torch.manual_seed(0)
    return Problem(OwnScale(), torch.randn(32, 4).double())


def variation(problem: Problem) -> Callable[[], Any]:
    def closure() -> Any:
        dist: Any = problem.policy(problem.observations)
        old: Any = problem.old
        return problem.closure()[0], (old.probs - dist.probs).abs().sum(-1).mean()

    return closure


def broadcast(problem: Problem) -> Callable[[], Any]:
    advantages = problem.advantages - problem.advantages.mean()

    def closure() -> Any:
        dist = problem.policy(problem.observations)
        ratio = (dist.log_prob(problem.actions) - problem.old_log_prob).exp()
        return -(ratio[:, None] * advantages).mean(), problem.closure()[1]

    return closure


def with_loss_inputs(problem: Problem) -> dict[str, Any]:
    return {
        "log_prob": lambda: problem.policy(problem.observations).log_prob(problem.actions),
        "advantages": problem.advantages,
    }


def bag() -> Problem:
    torch.manual_seed(0)
    return Problem(Bag(), torch.randint(10, (32, 4)))


def dropout() -> Problem:
    problem = gaussian()
    problem.policy = nn.Sequential(nn.Dropout(0.3), problem.policy)
    return problem


BROKEN_CLOSURES: dict[str, BrokenClosure] = {
    "one value": BrokenClosure(altered(lambda loss, kl: loss), "values", "returned one value"),
    "a float": BrokenClosure(
        altered(lambda loss, kl: (loss.item(), kl)), "values", "loss is a float.*without.*item"
    ),
    "a vector": BrokenClosure(
        altered(lambda loss, kl: (loss.expand(3), kl)), "values", r"shape \(3,\).*mean"
    ),
    "detached": BrokenClosure(
        altered(lambda loss, kl: (loss.detach(), kl)), "values", "detached: it does not depend"
    ),
    "backward inside": BrokenClosure(with_backward, "values", r"called backward\(\)"),
    "not a number": BrokenClosure(
        altered(lambda loss, kl: (loss * torch.nan, kl)), "values", "not a number"
    ),
    "an old policy with a graph": BrokenClosure(
        old_not_detached, "values", r"computed before it ran.*detach\(\)"
    ),
    "an old policy that shares a parameter's memory": BrokenClosure(
        lambda problem: problem.closure, "values", r"shares memory.*clone\(\)", problem=own_scale
    ),
    "random rows": BrokenClosure(on_random_rows, "deterministic", "draws a new minibatch"),
    "dropout": BrokenClosure(
        lambda problem: problem.closure, "deterministic", "dropout.*eval", problem=dropout
    ),
    "an entropy bonus in the KL": BrokenClosure(
        altered(lambda loss, kl: (loss, kl + 0.01)), "zero kl", "not about zero.*penalty"
    ),
    "an old policy of other weights": BrokenClosure(
        old_of_other_weights, "zero kl", "Compute the old distribution afresh"
    ),
    "the old policy made inside": BrokenClosure(
        old_made_inside, "moving kl", "never bind.*outside the closure"
    ),
    "the KL's negative": BrokenClosure(
        altered(lambda loss, kl: (loss, -kl)), "kl", "does not rise.*no negative"
    ),
    "a total variation": BrokenClosure(variation, "kl", "where 4 is right", problem=categorical),
    "the loss's negative": BrokenClosure(
        altered(lambda loss, kl: (-loss, kl)),
        "loss",
        "its sign is wrong.*maximize",
        options=with_loss_inputs,
    ),
    "a loss that broadcasts": BrokenClosure(
        broadcast, "loss", r"shapes broadcast.*\(N,\)", options=with_loss_inputs
    ),
    "an embedding bag": BrokenClosure(
        lambda problem: problem.closure, "second order", "EmbeddingBag", problem=bag
    ),
}
