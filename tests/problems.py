"""Small policies with a batch, a closure and a dense oracle: what the tests step on."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, get_args

import torch
import torch._dynamo
from devices import manual_seed, random_state, set_random_state
from torch import Tensor, nn
from torch.distributions import Categorical, Distribution, Independent, Normal, kl_divergence
from torch.func import functional_call

from trpo_optim import TrustRegionOptimizer
from trpo_optim.curvature.engine_choice import learned
from trpo_optim.hyperparameters import ModeName

ClosureValues = tuple[Tensor, Tensor]


class GaussianPolicy(nn.Module):
    """An MLP for the mean and one free log standard deviation per action dimension."""

    def __init__(self, observations: int, hidden: int, actions: int) -> None:
        super().__init__()
        self.network = nn.Sequential(
            nn.Linear(observations, hidden), nn.Tanh(), nn.Linear(hidden, actions)
        )
        self.log_std = nn.Parameter(torch.full((actions,), -0.3))

    def forward(self, observation: Tensor) -> Distribution:
        return Independent(Normal(self.network(observation), self.log_std.exp()), 1)


class CategoricalPolicy(nn.Module):
    """Any network whose output is taken for logits."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, observation: Tensor) -> Distribution:
        return Categorical(logits=self.network(observation))


@dataclass
class Problem:
    """A policy, the batch that its old self collected, and the closure on both.

    Attributes:
        refused: Why torch.func does not serve, where the optimizer is to know it beforehand.
    """

    policy: nn.Module
    observations: Tensor
    seed: int = 0
    refused: str = ""
    old: Distribution = field(init=False)
    actions: Tensor = field(init=False)
    advantages: Tensor = field(init=False)
    old_log_prob: Tensor = field(init=False)

    def __post_init__(self) -> None:
        """Let the current policy be the old one; its buffers and the random state stay."""
        buffers = copy.deepcopy(dict(self.policy.named_buffers()))
        state = random_state()
        with torch.no_grad():
            self.old = self.policy(self.observations)
            for name, buffer in self.policy.named_buffers():
                buffer.copy_(buffers[name])
            manual_seed(self.seed)
            self.actions = self.old.sample()
            self.old_log_prob = self.old.log_prob(self.actions)
            self.advantages = torch.randn_like(self.old_log_prob)
        set_random_state(state)

    def values(self, dist: Distribution) -> ClosureValues:
        """Return surrogate loss and mean KL of a new distribution."""
        ratio = (dist.log_prob(self.actions) - self.old_log_prob).exp()
        return -(ratio * self.advantages).mean(), kl_divergence(self.old, dist).mean()

    def closure(self) -> ClosureValues:
        """Return loss and KL of the policy as it is."""
        return self.values(self.policy(self.observations))

    def closure_with_dist(self) -> tuple[Tensor, Tensor, Distribution]:
        """Return loss, KL and distribution of the policy as it is."""
        dist = self.policy(self.observations)
        loss, kl = self.values(dist)
        return loss, kl, dist

    def parameters(self) -> list[nn.Parameter]:
        """Return the policy's parameters."""
        return list(self.policy.parameters())

    def optimizer(self, **settings: Any) -> TrustRegionOptimizer:
        """Return an optimizer of the policy."""
        optimizer = TrustRegionOptimizer(self.policy.parameters(), **{"lr": 1.0, **settings})
        learned(optimizer.param_groups[0])["parts"]["refusal"] = self.refused
        return optimizer

    def proven_optimizer(self, **settings: Any) -> TrustRegionOptimizer:
        """Return an optimizer as after its first step, which compares products with others."""
        optimizer = self.optimizer(**settings)
        for choice in learned(optimizer.param_groups[0]).values():
            choice["proven"] = True
        return optimizer

    def vector(self) -> Tensor:
        """Return a copy of the parameters as one vector."""
        return torch.cat([each.detach().reshape(-1) for each in self.policy.parameters()]).clone()

    def _of_vector(self, index: int) -> Callable[[Tensor], Tensor]:
        shapes = {name: each.shape for name, each in self.policy.named_parameters()}

        def value(vector: Tensor) -> Tensor:
            pieces = torch.split(vector, [shape.numel() for shape in shapes.values()])
            named = {
                name: piece.view(shape)
                for (name, shape), piece in zip(shapes.items(), pieces, strict=True)
            }
            return self.values(functional_call(self.policy, named, (self.observations,)))[index]

        return value

    def dense_gradient(self) -> Tensor:
        """Return the gradient of the loss by torch.autograd's functional interface."""
        gradient: Tensor = torch.autograd.functional.jacobian(self._of_vector(0), self.vector())
        return gradient

    def dense_fisher(self) -> Tensor:
        """Return the Hessian of the KL, an (n, n) matrix, row by row."""
        fisher: Tensor = torch.autograd.functional.hessian(self._of_vector(1), self.vector())
        return fisher


def gaussian(
    seed: int = 0,
    *,
    dtype: torch.dtype = torch.float64,
    device: str = "cpu",
    samples: int = 64,
    observations: int = 4,
    hidden: int = 6,
    actions: int = 2,
) -> Problem:
    """Return a Gaussian policy's problem."""
    manual_seed(seed)
    policy = GaussianPolicy(observations, hidden, actions).to(device, dtype)
    return Problem(policy, torch.randn(samples, observations, dtype=dtype).to(device), seed)


def categorical(
    seed: int = 0,
    *,
    dtype: torch.dtype = torch.float64,
    device: str = "cpu",
    samples: int = 64,
    observations: int = 4,
    hidden: int = 6,
    actions: int = 3,
) -> Problem:
    """Return a categorical policy's problem."""
    manual_seed(seed)
    network = nn.Sequential(nn.Linear(observations, hidden), nn.Tanh(), nn.Linear(hidden, actions))
    policy = CategoricalPolicy(network).to(device, dtype)
    return Problem(policy, torch.randn(samples, observations, dtype=dtype).to(device), seed)


PROBLEMS = [gaussian, categorical]
MODES = get_args(ModeName)


@dataclass(frozen=True)
class Snapshot:
    """Every bit that a step must leave alone: parameters, buffers, gradients, modes, randomness."""

    tensors: list[tuple[str, int, Tensor]]
    gradients: list[tuple[int, Tensor | None]]
    training: list[bool]
    random: list[Tensor]
    switches: list[Any]

    @classmethod
    def of(cls, module: nn.Module) -> Snapshot:
        """Copy the state of a module and of torch's random generator."""
        tensors = [*module.named_parameters(), *module.named_buffers()]
        grads = [each.grad for each in module.parameters()]
        return cls(
            [(name, each.data_ptr(), each.detach().clone()) for name, each in tensors],
            [(id(grad), None if grad is None else grad.clone()) for grad in grads],
            [each.training for each in module.modules()],
            random_state(),
            switches(),
        )

    def differences(self, other: Snapshot) -> list[str]:
        """Return what differs, by name; identity of storage and of ``.grad`` counts too."""
        found = [
            name
            for (name, place, value), (_, place_now, value_now) in zip(
                self.tensors, other.tensors, strict=True
            )
            if place != place_now or not _same_bits(value, value_now)
        ]
        for (identity, grad), (identity_now, grad_now) in zip(
            self.gradients, other.gradients, strict=True
        ):
            changed = identity != identity_now
            if changed or (grad is not None and grad_now is not None and (grad != grad_now).any()):
                found.append("grad")
        found += ["training"] * (self.training != other.training)
        pairs = zip(self.random, other.random, strict=True)
        found += ["random"] * any(not torch.equal(ours, theirs) for ours, theirs in pairs)
        return found + ["switches"] * (self.switches != other.switches)


def switches() -> list[Any]:
    """Return what decides on kernels, and whether compiled modules run compiled."""
    backends = torch.backends
    names = ("enabled", "benchmark", "deterministic", "allow_tf32")
    return [
        backends.cuda.flash_sdp_enabled(),
        backends.cuda.mem_efficient_sdp_enabled(),
        backends.cuda.math_sdp_enabled(),
        backends.cuda.cudnn_sdp_enabled(),
        backends.mha.get_fastpath_enabled(),
        backends.mkldnn.enabled,
        *(getattr(backends.cudnn, name) for name in names),
        torch._dynamo.eval_frame._stance,
    ]


def _same_bits(left: Tensor, right: Tensor) -> bool:
    mine, others = (each.detach().cpu().numpy().tobytes() for each in (left, right))
    return mine == others


def give_gradients(module: nn.Module) -> None:
    """Put a ``.grad`` on every parameter but the first, as another optimizer would have."""
    for parameter in list(module.parameters())[1:]:
        parameter.grad = torch.ones_like(parameter)
