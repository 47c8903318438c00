"""Training from scratch, with every step's KL measured afresh: in float64, written out by hand."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import critic_fit
import gymnasium as gym
import normaliser
import numpy as np
import torch
import train
import training_run
from gymnasium.vector import AutoresetMode, SyncVectorEnv
from processes import Processes
from torch import Tensor, nn

from trpo_optim import TrustRegionOptimizer, frozen, log_prob, mean_kl, sample, sampled_kl

Divergence = Callable[[Any, Any, Any], Tensor]
"""KL(old ‖ new) row by row, from the two distributions; a sampled one from the actions, too."""


def categorical_kl(old: Any, new: Any, actions: Any) -> Tensor:
    """Return Σ p ln(p/q) over the actions that are possible."""
    p, q = (each.logits.exp() / each.logits.exp().sum(-1, keepdim=True) for each in (old, new))
    return torch.where(p > 0, p * (p / q).log(), 0).sum(-1)


def normal_kl(old: Any, new: Any, actions: Any) -> Tensor:
    """Return the KL of two Independent(Normal, 1)."""
    before, after = old.base_dist, new.base_dist
    spread = (before.scale / after.scale).square()
    shift = ((after.loc - before.loc) / after.scale).square()
    kl: Tensor = 0.5 * (spread + shift - 1 - spread.log())
    return kl.sum(-1)


def beta_kl(old: Any, new: Any, actions: Any) -> Tensor:
    """Return the KL of two Independent(Beta, 1)."""
    a, b = old.base_dist.concentration1, old.base_dist.concentration0
    c, d = new.base_dist.concentration1, new.base_dist.concentration0
    normaliser_old = a.lgamma() + b.lgamma() - (a + b).lgamma()
    normaliser_new = c.lgamma() + d.lgamma() - (c + d).lgamma()
    mean_log = a.digamma() - (a + b).digamma()
    mean_log_rest = b.digamma() - (a + b).digamma()
    kl: Tensor = normaliser_new - normaliser_old + (a - c) * mean_log + (b - d) * mean_log_rest
    return kl.sum(-1)


def squashed_normal_kl(old: Any, new: Any, actions: Any) -> Tensor:
    """Return the KL before the squashing, which does not change it."""
    return normal_kl(old.base_dist, new.base_dist, actions)


def multi_discrete_kl(old: Any, new: Any, actions: Any) -> Tensor:
    """Return the sum over the parts of a tuple."""
    parts = [categorical_kl(*pair, actions) for pair in zip(old, new, strict=True)]
    return torch.stack(parts).sum(0)


def sampled_mixture_kl(old: Any, new: Any, actions: Tensor) -> Tensor:
    """Return ln π_old − ln π_new of the actions under mixtures of Independent(Normal, 1)."""

    def density(dist: Any) -> Tensor:
        logits, parts = dist.mixture_distribution.logits, dist.component_distribution.base_dist
        weights = logits.exp() / logits.exp().sum(-1, keepdim=True)
        standard = (actions.unsqueeze(-2) - parts.loc) / parts.scale
        bells = (-0.5 * standard.square()).exp() / (parts.scale * (2 * torch.pi) ** 0.5)
        weighted: Tensor = weights * bells.prod(-1)
        return weighted.sum(-1)

    return density(old).log() - density(new).log()


class Learner:
    """A policy, its optimizer, and the formula that its steps are checked by."""

    def __init__(
        self,
        policy: nn.Module,
        divergence: Divergence,
        *,
        max_kl: float = 0.03,
        sampled: bool = False,
    ) -> None:
        self.policy, self.divergence = policy, divergence
        self.max_kl, self.sampled = max_kl, sampled
        self.optimizer = TrustRegionOptimizer(policy.parameters(), max_kl=max_kl)

    def update(
        self, observations: Tensor, actions: Any, advantages: Tensor, mask: Tensor | None = None
    ) -> None:
        """Take one step; advantages of any scale and mean, or rewards."""
        chosen = torch.ones_like(advantages, dtype=torch.bool) if mask is None else mask
        advantages = (advantages - advantages[chosen].mean()) / (advantages[chosen].std() + 1e-8)
        policy_before = copy.deepcopy(self.policy)
        with torch.no_grad():
            old = frozen(self.policy(observations))
            old_log_prob = log_prob(old, actions)

        def closure() -> tuple[Tensor, Tensor, Any]:
            dist = self.policy(observations)
            new_log_prob = log_prob(dist, actions)
            ratio = (new_log_prob - old_log_prob).exp()
            loss = -(ratio * advantages)[chosen].mean()
            if self.sampled:
                return loss, sampled_kl(old_log_prob, new_log_prob, mask), new_log_prob
            return loss, mean_kl(old, dist, mask), dist

        report = self.optimizer.step(closure)
        if report.accepted:
            with torch.no_grad():
                before, after = (
                    copy.deepcopy(each).double()(observations.double())
                    for each in (policy_before, self.policy)
                )
                kl = self.divergence(before, after, actions)[chosen].mean().item()
            assert kl <= self.max_kl * (1 + 1e-4), f"KL {kl:.9f} after {report}"


@dataclass
class Bandit:
    """A task in which one action follows one observation.

    Attributes:
        draw: Returns so many observations, and for each what its reward depends on.
        reward: Judges actions by the latter.
        mask: Returns which elements of observations count; None: all.
    """

    draw: Callable[[int], tuple[Tensor, Tensor]]
    reward: Callable[[Any, Tensor], Tensor]
    mask: Callable[[Tensor], Tensor | None] = lambda observations: None

    def score(self, act: Callable[[Tensor], Any]) -> float:
        """Return the mean reward of what is done on fresh observations."""
        observations, secret = self.draw(4096)
        rewards, mask = self.reward(act(observations), secret), self.mask(observations)
        return (rewards if mask is None else rewards[mask]).mean().item()

    def learn(self, learner: Learner, *, updates: int, rows: int = 512) -> float:
        """Return the score after so many updates."""
        for _ in range(updates):
            observations, secret = self.draw(rows)
            actions = act(learner.policy, observations)
            rewards = self.reward(actions, secret)
            learner.update(observations, actions, rewards, self.mask(observations))
        return self.score(lambda observations: act(learner.policy, observations))


@torch.no_grad()
def act(policy: nn.Module, observations: Tensor) -> Any:
    """Return an action per row, in the form of the space; parts of a tuple are stacked."""
    actions = sample(policy(observations))
    return torch.stack(actions, -1) if isinstance(actions, tuple) else actions


def learn_environment(
    make: Callable[[], gym.Env[Any, Any]],
    learner: Learner,
    critic: nn.Sequential,
    *,
    seed: int,
    gamma: float,
    critic_lr: float,
    updates: int,
    batch_size: int = 2000,
) -> float:
    """Return the mean return of the last 100 episodes, by the rollouts and GAE of the example.

    Args:
        make: Returns an environment with array observations, which are used as they are.
        learner: What acts in it.
        critic: Maps observations to values.
        seed: The environments' seed.
        gamma: The discount factor.
        critic_lr: Adam's learning rate for the critic.
        updates: How often to learn from a batch of 20 environments.
        batch_size: Steps of a batch.
    """
    args = train.Args(
        seed=seed,
        num_envs=20,
        batch_size=batch_size,
        gamma=gamma,
        critic_epochs=10,
        critic_minibatch=200,
    )
    policy: Any = learner.policy
    envs = SyncVectorEnv([make] * args.num_envs, autoreset_mode=AutoresetMode.SAME_STEP)
    size = math.prod(envs.single_observation_space.shape or ())
    run = training_run.Run(
        args=args,
        processes=Processes("cpu"),
        envs=envs,
        policy=policy,
        critic=critic,
        critic_of_all=critic,
        optimizer=learner.optimizer,
        critic_optimizer=torch.optim.Adam(critic.parameters(), lr=critic_lr),
        normalise=normaliser.Normaliser(size, "cpu"),  # never updated: observations stay
        discounted=torch.zeros(args.num_envs),
    )
    for _ in range(updates):
        batch = train.collect(run)
        critic_fit.count_returns(run, batch)
        run.batches = [batch]
        advantages = critic_fit.advantages(run, batch, run.args.gae_lambda)
        observations, actions = batch.flat(batch.observations), batch.flat(batch.actions)
        learner.update(observations, actions, batch.flat(advantages))
        critic_fit.fit_critic(run)
        run.update += 1
    envs.close()
    return float(np.mean([value for _, value in run.episodes[-100:]]))
