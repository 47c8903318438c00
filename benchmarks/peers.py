"""One policy update of other libraries' TRPO, on this benchmark's network and batch.

Each peer runs its own shipped update, critic switched off. What a radius and a damping mean differs
from library to library; here both are given for the joint KL and converted.
"""

from __future__ import annotations

import abc
import copy
import math
import warnings
from dataclasses import dataclass
from importlib.metadata import version
from typing import Any

import gymnasium as gym
import numpy as np
import sb3_contrib
import torch
from gymnasium import spaces
from stable_baselines3.common.logger import Logger
from tianshou.algorithm.modelfree.reinforce import ProbabilisticActorPolicy
from tianshou.algorithm.modelfree.trpo import TRPO
from tianshou.algorithm.optim import TorchOptimizerFactory
from tianshou.data import Batch
from torch import Tensor, nn
from torch.distributions import Categorical, Distribution


@dataclass(frozen=True)
class PeerBatch:
    """What one update sees, on the policy's device.

    Attributes:
        observations: Shape (N, D).
        actions: Shape (N, A), or (N,) for discrete ones.
        advantages: Shape (N,), normalised or not: no peer normalises them again.
        old_log_prob: Log-probability of the actions under the starting policy, shape (N,).
    """

    observations: Tensor
    actions: Tensor
    advantages: Tensor
    old_log_prob: Tensor


class Peer(abc.ABC):
    """Another library's TRPO, with a copy of the policy.

    Args:
        policy: Maps observations to ``Independent(Normal)`` or ``Categorical``; float32, tanh
            between its linear layers, a parameter ``log_std`` where actions are continuous.
        batch: The batch of every update.
        max_kl: Radius in nats of the joint KL.
        damping: λ in (F + λI) x = g, F the Hessian of the joint KL, or None for the library's
            default, which it may mean for another KL.
        cg_iterations: Most iterations of conjugate gradient, or None for the library's default.

    Raises:
        ValueError: If the copy is not the same policy.
    """

    name: str

    def __init__(
        self,
        policy: nn.Module,
        batch: PeerBatch,
        *,
        max_kl: float,
        damping: float | None,
        cg_iterations: int | None,
    ) -> None:
        self._max_kl, self._damping, self._cg_iterations = max_kl, damping, cg_iterations
        with warnings.catch_warnings():  # one library recommends CPUs
            warnings.simplefilter("ignore")
            self._parameters = self._build(policy, batch)
        with torch.no_grad():
            for theirs, ours in zip(self._parameters, policy.parameters(), strict=True):
                theirs.copy_(ours)
            log_prob = self._log_prob(batch)
        self._start = [parameter.detach().clone() for parameter in self._parameters]
        difference = float((log_prob - batch.old_log_prob).abs().max())
        if not difference < 1e-5:
            raise ValueError(
                f"{self.name} finds log-probabilities that differ by up to {difference:.2g} from "
                "old_log_prob; hand over the starting policy, with tanh between its layers."
            )

    def parameters(self) -> list[Tensor]:
        """Return the copy's parameters, in the order of the policy's own."""
        return list(self._parameters)

    def reset(self) -> None:
        """Put the starting weights back, in place."""
        torch._foreach_copy_([parameter.detach() for parameter in self._parameters], self._start)

    def update(self) -> None:
        """Run one policy update by the library's own code."""
        with warnings.catch_warnings():  # of backtracking, and of a mean over no critic losses
            warnings.simplefilter("ignore")
            self._update()

    @abc.abstractmethod
    def _build(self, policy: nn.Module, batch: PeerBatch) -> list[nn.Parameter]:
        """Set the library up; return its parameters in the order of the policy's, values aside."""

    @abc.abstractmethod
    def _log_prob(self, batch: PeerBatch) -> Any:
        """Return the copy's log-probabilities of the batch's actions, shape (N,)."""

    @abc.abstractmethod
    def _update(self) -> None:
        """Run one policy update."""


class Sb3Contrib(Peer):
    """sb3-contrib, whose KL is KL(new ‖ old), averaged over the action dimensions."""

    name = f"sb3-contrib {version('sb3-contrib')}"

    def _build(self, policy: nn.Module, batch: PeerBatch) -> list[nn.Parameter]:
        layers = [m for m in policy.modules() if isinstance(m, nn.Linear)]
        samples = len(batch.observations)
        hidden = [layer.out_features for layer in layers[:-1]]
        env: gym.Env[Any, Any] = gym.Env()  # never stepped
        env.observation_space = _box(batch.observations, math.inf)
        env.action_space, dimensions = _action_space(policy, batch)
        self._algorithm = sb3_contrib.TRPO(
            "MlpPolicy",
            env,
            n_steps=samples,
            batch_size=samples,
            target_kl=self._max_kl / dimensions,
            n_critic_updates=0,
            normalize_advantage=False,
            policy_kwargs={"net_arch": {"pi": hidden, "vf": []}, "activation_fn": nn.Tanh},
            device=batch.observations.device,
        )
        if self._damping is not None:
            self._algorithm.cg_damping = self._damping / dimensions
        if self._cg_iterations is not None:
            self._algorithm.cg_max_steps = self._cg_iterations
        self._algorithm.set_logger(Logger(folder=None, output_formats=[]))
        buffer = self._algorithm.rollout_buffer
        buffer.observations[:, 0] = batch.observations.cpu().numpy()
        buffer.actions[:, 0] = batch.actions.reshape(samples, -1).cpu().numpy()
        buffer.advantages[:, 0] = batch.advantages.cpu().numpy()
        buffer.log_probs[:, 0] = batch.old_log_prob.cpu().numpy()
        buffer.pos, buffer.full = samples, True
        copied = self._algorithm.policy
        theirs = [m for m in copied.mlp_extractor.policy_net if isinstance(m, nn.Linear)]
        counterparts: dict[Any, Any] = {}
        for layer, twin in zip(layers, [*theirs, copied.action_net], strict=True):
            counterparts |= {layer.weight: twin.weight, layer.bias: twin.bias}
        if isinstance(env.action_space, spaces.Box):
            counterparts[policy.log_std] = copied.log_std
        return [counterparts[parameter] for parameter in policy.parameters()]

    def _log_prob(self, batch: PeerBatch) -> Any:
        return self._algorithm.policy.evaluate_actions(batch.observations, batch.actions)[1]

    def _update(self) -> None:
        self._algorithm.train()


class Tianshou(Peer):
    """Tianshou, whose KL is KL(old ‖ new) of the distribution that the policy builds: joint.

    It fails without a critic update, so it makes one: of a single number that is right already.
    """

    name = f"Tianshou {version('tianshou')}"

    def _build(self, policy: nn.Module, batch: PeerBatch) -> list[nn.Parameter]:
        actor = _Actor(policy)
        self._algorithm = TRPO(
            policy=ProbabilisticActorPolicy(
                actor=actor,  # type: ignore[arg-type, unused-ignore]
                dist_fn=lambda distribution: distribution,  # type: ignore[arg-type, unused-ignore]
                action_space=_action_space(policy, batch)[0],
                action_scaling=False,
                action_bound_method=None,
            ),
            critic=_Zero().to(batch.observations.device),
            optim=TorchOptimizerFactory(torch.optim.SGD, lr=0.0),
            optim_critic_iters=1,
            max_kl=self._max_kl,
        )
        if self._damping is not None:
            self._algorithm._damping = self._damping
        if self._cg_iterations is not None:
            _set_iterations(self._algorithm, self._cg_iterations)
        self._batch: Any = Batch(
            obs=batch.observations,
            act=batch.actions,
            adv=batch.advantages,
            logp_old=batch.old_log_prob,
            returns=torch.zeros_like(batch.advantages),
            info=Batch(),
        )
        return list(actor.parameters())

    def _log_prob(self, batch: PeerBatch) -> Any:
        return self._algorithm.policy(self._batch).dist.log_prob(batch.actions)

    def _update(self) -> None:
        self._algorithm._update_with_batch(self._batch, batch_size=None, repeat=1)


class _Actor(nn.Module):
    """A copy of the policy, called as Tianshou calls an actor."""

    def __init__(self, policy: nn.Module) -> None:
        super().__init__()
        self.policy = copy.deepcopy(policy)

    def forward(self, obs: Tensor, state: Any = None, info: Any = None) -> tuple[Distribution, Any]:  # noqa: ARG002
        return self.policy(obs), state


class _Zero(nn.Module):
    """A critic of one number."""

    def __init__(self) -> None:
        super().__init__()
        self.value = nn.Parameter(torch.zeros(()))

    def forward(self, obs: Tensor) -> Tensor:
        return self.value.expand(len(obs))


def _set_iterations(algorithm: Any, iterations: int) -> None:
    """Have Tianshou's own solver run for another number of iterations than the update asks for."""
    solve = algorithm._conjugate_gradients
    algorithm._conjugate_gradients = lambda *given, **_: solve(*given, nsteps=iterations)


def _action_space(policy: nn.Module, batch: PeerBatch) -> tuple[spaces.Space[Any], int]:
    """Return the space of the policy's actions, and over how many dimensions a KL is averaged."""
    with torch.no_grad():
        distribution = policy(batch.observations[:1])
    if isinstance(distribution, Categorical):
        return spaces.Discrete(distribution.logits.shape[-1]), 1
    return _box(batch.actions, 1.0), batch.actions.shape[-1]


def _box(rows: Tensor, limit: float) -> spaces.Box:
    return spaces.Box(-limit, limit, shape=tuple(rows.shape[1:]), dtype=np.float32)
