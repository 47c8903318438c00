"""Train by vine, the paper's second sampling scheme, or by single path at equal simulator steps.

    python examples/vine.py --env-id CartPole-v1
    python examples/vine.py --env-id Swimmer-v5 --sampling single-path
    python examples/vine.py --env-id ALE/Pong-v5 --total-steps 200000

Vine returns to states of its trajectories and tries several actions from each, all branches of a
state with the same random numbers: all actions where they are few (equation 15), else some that the
policy draws (equation 16). A step of the simulator counts the same wherever it is taken.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import ale_py
import gymnasium as gym
import numpy as np
import torch
import tyro
from gymnasium.vector import AutoresetMode, SyncVectorEnv
from gymnasium.wrappers.utils import RunningMeanStd
from torch import Tensor, nn
from torch.distributions import Categorical, Distribution, Independent, Normal
from tqdm import tqdm
from train import Normaliser, mlp

from trpo_optim import Closures, TrustRegionOptimizer
from trpo_optim.rollouts import (
    SinglePathBatch,
    fit_value,
    gae,
    policy_closure,
    single_path,
    vine,
    vine_closure,
)

gym.register_envs(ale_py)


@dataclass(frozen=True)
class Args:
    """Settings of one run."""

    env_id: str = "CartPole-v1"
    """Gymnasium environment whose state can be captured"""
    sampling: Literal["vine", "single-path"] = "vine"
    """where the data comes from"""
    seed: int = 0
    """seed of the networks, the actions and the environments"""
    total_steps: int = 200_000
    """simulator steps, those of branches included"""
    max_kl: float = 0.01
    """trust-region radius in nats"""
    num_envs: int = 16
    """environments stepped side by side"""
    trunk_steps: int = 64
    """steps of each environment per update"""
    states: int = 64
    """vine: how many states of the trunk to branch from"""
    branches: int = 4
    """vine: actions per state where not all can be tried"""
    horizon: int = 10
    """vine: steps of a branch; then the critic says what the rest is worth"""
    curvature: float | None = None
    """the share of the states that Fisher-vector products are taken on; None: all"""
    gamma: float = 0.99
    """discount"""
    gae_lambda: float = 0.95
    """GAE's lambda: of the critic's targets, and of single path's advantages"""
    critic_lr: float = 1e-3
    """the critic's learning rate (Adam)"""
    critic_epochs: int = 20
    """the critic's passes over each trunk"""


def make_envs(args: Args) -> SyncVectorEnv:
    """Return environments that vine can return to a state of."""

    def make() -> gym.Env[Any, Any]:
        if not args.env_id.startswith("ALE/"):
            return gym.make(args.env_id)
        # The emulator does not say which action it repeated last; the wrapper does.
        game = gym.make(args.env_id, frameskip=1, repeat_action_probability=0.0)
        frames = gym.wrappers.AtariPreprocessing(game, screen_size=42)
        return gym.wrappers.FrameStackObservation(gym.wrappers.StickyAction(frames, 0.25), 4)

    return SyncVectorEnv([make] * args.num_envs, autoreset_mode=AutoresetMode.SAME_STEP)


def pixels(outputs: int, gain: float) -> nn.Sequential:
    """Return the paper's network for Atari: two convolutions of 16 channels, then 20 units."""
    head = nn.Linear(20, outputs)
    nn.init.orthogonal_(head.weight, gain)
    first, second = nn.Conv2d(4, 16, 4, 2), nn.Conv2d(16, 16, 4, 2)
    body = (nn.Flatten(), nn.Linear(16 * 9 * 9, 20), nn.ReLU(), head)
    return nn.Sequential(first, nn.ReLU(), second, nn.ReLU(), *body)


class Frames:
    """Subtracts what a pixel is on average, and divides by the deviation of all: what moves stays.

    Without it Pong's ball is lost in the field.
    """

    def __init__(self, size: tuple[int, ...]) -> None:
        self.stats = RunningMeanStd(shape=size)

    def update(self, frames: Tensor) -> None:
        """Count further frames in, the latest of each stack, (B, K, H, W)."""
        self.stats.update(frames[:, -1].numpy())

    def __call__(self, frames: Tensor) -> Tensor:
        """Return them as numbers, in the layout that convolutions are fastest in on a CPU."""
        numbers = frames.to(torch.float32, memory_format=torch.channels_last)
        mean = torch.as_tensor(self.stats.mean, dtype=torch.float32)
        return ((numbers - mean) / math.sqrt(self.stats.var.mean())).clamp_(-10, 10)


class Agent(nn.Module):
    """Policy and critic, on observations as the environments give them."""

    def __init__(self, envs: SyncVectorEnv) -> None:
        super().__init__()
        space, actions = envs.single_observation_space, envs.single_action_space
        self.discrete = isinstance(actions, gym.spaces.Discrete)
        outputs = math.prod(actions.shape or ())
        if isinstance(actions, gym.spaces.Discrete):
            outputs = int(actions.n)
        self.scaled: Frames | Normaliser
        if space.dtype == np.uint8:
            self.scaled = Frames((space.shape or ())[1:])
            self.policy, self.critic = pixels(outputs, 0.01), pixels(1, 1.0)
        else:
            size = math.prod(space.shape or ())
            self.scaled = Normaliser(size, "cpu")
            self.policy, self.critic = mlp(size, 64, outputs, 0.01), mlp(size, 64, 1, 1.0)
        self.log_std = nn.Parameter(torch.zeros(outputs), requires_grad=not self.discrete)

    def act(self, observations: Tensor) -> Distribution:
        """Return the distribution over actions."""
        output = self.policy(self.scaled(observations))
        if self.discrete:
            return Categorical(logits=output)
        return Independent(Normal(output, self.log_std.exp()), 1)

    def value(self, observations: Tensor) -> Tensor:
        """Return the critic's value, shape (B,)."""
        value: Tensor = self.critic(self.scaled(observations)).squeeze(-1)
        return value

    def count(self, observations: Tensor) -> None:
        """Count observations into the normalisation."""
        self.scaled.update(observations)


def collect(
    args: Args, envs: SyncVectorEnv, agent: Agent, after: SinglePathBatch | None
) -> tuple[SinglePathBatch, Callable[[Tensor], Closures], int]:
    """Return trajectories, what makes the step's closures of their advantages, and their price."""
    seed = args.seed if after is None else None
    if args.sampling == "single-path":
        path = single_path(envs, agent.act, steps=args.trunk_steps, after=after, seed=seed)
        closures = partial(policy_closure, agent.act, path, curvature=args.curvature)
        return path, closures, int(path.valid.sum())
    batch = vine(
        envs,
        agent.act,
        steps=args.trunk_steps,
        states=args.states,
        branches=None if agent.discrete else args.branches,
        horizon=args.horizon,
        discount=args.gamma,
        critic=agent.value,
        after=after,
        seed=seed,
    )
    closures = partial(vine_closure, agent.act, batch, curvature=args.curvature)
    return batch.trunk, lambda _: closures(), batch.steps


def train(args: Args) -> list[tuple[int, float]]:
    """Train one agent.

    Args:
        args: The settings.

    Returns:
        For every episode of the trajectories the simulator steps by its end, and its return.
    """
    torch.manual_seed(args.seed)
    torch.set_num_threads(1)
    envs = make_envs(args)
    agent = Agent(envs)
    parameters = [*agent.policy.parameters(), agent.log_std]
    optimizer = TrustRegionOptimizer(parameters, max_kl=args.max_kl)
    critic_optimizer = torch.optim.Adam(agent.critic.parameters(), lr=args.critic_lr)
    episodes: list[tuple[int, float]] = []
    path, steps = None, 0
    with tqdm(total=args.total_steps, unit="step") as progress:
        while steps < args.total_steps:
            path, closures, price = collect(args, envs, agent, path)
            steps += price
            values, following = path.values(agent.value)
            gains = gae(
                path.rewards,
                values,
                following,
                path.ends,
                discount=args.gamma,
                gae_lambda=args.gae_lambda,
            )
            report = optimizer.step(closures(gains - gains.mean()))
            observations = path.flat(path.observations)
            fit = fit_value(
                agent.value,
                observations,
                path.flat(gains + values),
                critic_optimizer,
                epochs=args.critic_epochs,
                minibatch=128,
            )
            agent.count(observations)
            episodes += [(steps, value) for value in path.episode_returns]
            recent = np.mean([value for _, value in episodes[-20:]] or [math.nan])
            progress.update(price)
            progress.set_postfix_str(
                f"return {recent:.1f}, KL {report.kl:.4f}, "
                f"critic {fit.explained_variance:.2f}, {report.outcome.name}"
            )
    envs.close()
    print(
        f"{args.env_id} {args.sampling} seed {args.seed}: mean return of the last 20 episodes "
        f"{recent:.1f} after {steps} simulator steps, {len(episodes)} episodes"
    )
    return episodes


if __name__ == "__main__":
    train(tyro.cli(Args))
