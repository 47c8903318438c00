"""TRPO for continuous actions in one file, for people who write CleanRL-style loops."""

from __future__ import annotations

import math
import time
from dataclasses import dataclass
from typing import Any

import gymnasium as gym
import numpy as np
import torch
import tyro
from gymnasium.vector import SyncVectorEnv
from torch import Tensor, nn
from torch.distributions import Distribution, Independent, Normal
from torch.utils.tensorboard import SummaryWriter

from trpo_optim import StepReport, TrustRegionOptimizer, frozen, mean_kl
from trpo_optim.rollouts import fit_value, gae


@dataclass
class Args:
    """Settings of one run."""

    env_id: str = "HalfCheetah-v5"
    seed: int = 1
    total_timesteps: int = 1_000_000
    num_envs: int = 1
    num_steps: int = 1024  # of each environment per update
    gamma: float = 0.99
    gae_lambda: float = 0.95
    max_kl: float = 0.007  # nats per action dimension
    critic_lr: float = 1e-3


def make_env(args: Args) -> gym.Env[Any, Any]:
    """Return an environment with scaled observations and rewards."""
    env: gym.Env[Any, Any] = gym.wrappers.FlattenObservation(gym.make(args.env_id))
    env = gym.wrappers.RecordEpisodeStatistics(env)  # of the rewards before scaling
    env = gym.wrappers.NormalizeObservation(gym.wrappers.ClipAction(env))
    env = gym.wrappers.TransformObservation(env, lambda obs: np.clip(obs, -10, 10), None)
    env = gym.wrappers.NormalizeReward(env, gamma=args.gamma)
    return gym.wrappers.TransformReward(env, lambda reward: np.clip(float(reward), -10, 10))


def mlp(inputs: int, outputs: int, gain: float) -> nn.Sequential:
    """Return a network of two tanh layers, orthogonally initialised."""
    layers = [nn.Linear(inputs, 64), nn.Linear(64, 64), nn.Linear(64, outputs)]
    for layer, scale in zip(layers, (math.sqrt(2), math.sqrt(2), gain), strict=True):
        nn.init.orthogonal_(layer.weight, scale)
        nn.init.zeros_(layer.bias)
    return nn.Sequential(layers[0], nn.Tanh(), layers[1], nn.Tanh(), layers[2])


class Agent(nn.Module):
    """Holds actor, log_std and critic."""

    def __init__(self, inputs: int, dimensions: int) -> None:
        super().__init__()
        self.critic = mlp(inputs, 1, gain=1.0)
        self.actor = mlp(inputs, dimensions, gain=0.01)
        # More dimensions need less noise each: the first std is 1 for one, 0.74 for 3, 0.37 for 6.
        self.log_std = nn.Parameter(torch.full((dimensions,), min(0.8 - math.log(dimensions), 0.0)))

    def dist(self, obs: Tensor) -> Distribution:
        """Return the distribution over actions. `Independent` makes each vector one action."""
        return Independent(Normal(self.actor(obs), self.log_std.exp()), 1)


def improve_policy(
    agent: Agent, optimizer: TrustRegionOptimizer, obs: Tensor, actions: Tensor, advantages: Tensor
) -> StepReport:
    """Take one step on the whole batch. It replaces PPO's epochs of clipped minibatches."""
    with torch.no_grad():
        old_dist = frozen(agent.dist(obs))
        old_log_prob = old_dist.log_prob(actions)
    advantages = (advantages - advantages.mean()) / (advantages.std() + 1e-8)

    def closure() -> tuple[Tensor, Tensor, Distribution]:
        dist = agent.dist(obs)
        ratio = (dist.log_prob(actions) - old_log_prob).exp()
        return -(ratio * advantages).mean(), mean_kl(old_dist, dist), dist

    return optimizer.step(closure)


def train(args: Args) -> list[float]:
    """Train one agent, and return the return of every finished episode in order."""
    torch.manual_seed(args.seed)
    writer = SummaryWriter(f"runs/{args.env_id}__trpo__{args.seed}__{int(time.time())}")
    envs = SyncVectorEnv([lambda: make_env(args)] * args.num_envs, autoreset_mode="SameStep")
    inputs = gym.spaces.flatdim(envs.single_observation_space)
    dimensions = gym.spaces.flatdim(envs.single_action_space)
    agent = Agent(inputs, dimensions)
    # The closure does not reach the critic, so this optimizer leaves the critic as it is.
    optimizer = TrustRegionOptimizer(agent.parameters(), max_kl=args.max_kl * dimensions)
    critic_optimizer = torch.optim.Adam(agent.critic.parameters(), lr=args.critic_lr)
    obs, following = torch.zeros(2, args.num_steps, args.num_envs, inputs)
    actions = torch.zeros(args.num_steps, args.num_envs, dimensions)
    rewards, terminated, ended = torch.zeros(3, args.num_steps, args.num_envs)
    episodes, global_step, start_time = list[float](), 0, time.time()
    next_obs = torch.as_tensor(envs.reset(seed=args.seed)[0])

    while global_step + args.num_steps * args.num_envs <= args.total_timesteps:
        for step in range(args.num_steps):
            global_step += args.num_envs
            obs[step] = next_obs
            with torch.no_grad():
                actions[step] = agent.dist(obs[step]).sample()
            seen, reward, terminations, truncations, infos = envs.step(actions[step].numpy())
            following[step] = next_obs = torch.as_tensor(seen)
            rewards[step] = torch.as_tensor(reward)
            ends = terminations | truncations
            terminated[step], ended[step] = torch.as_tensor(np.stack([terminations, ends]))
            for i in np.flatnonzero(ends):  # there next_obs begins a new episode
                following[step, i] = torch.as_tensor(infos["final_obs"][i])
                episodes.append(float(infos["final_info"]["episode"]["r"][i]))
                writer.add_scalar("charts/episodic_return", episodes[-1], global_step)
                print(f"global_step={global_step}, episodic_return={episodes[-1]:.1f}")

        ended[-1] = 1.0
        with torch.no_grad():  # 0 after termination; after truncation V of the final observation
            values = agent.critic(obs).squeeze(-1)
            next_values = agent.critic(following).squeeze(-1) * (1 - terminated)
        advantages = gae(
            rewards, values, next_values, ended.bool(), gamma=args.gamma, gae_lambda=args.gae_lambda
        )
        b_obs, targets = obs.flatten(0, 1), (advantages + values).flatten()
        report = improve_policy(
            agent, optimizer, b_obs, actions.flatten(0, 1), advantages.flatten()
        )
        fit = fit_value(agent.critic, b_obs, targets, critic_optimizer, epochs=10, minibatch=128)
        entropy = agent.dist(b_obs[:1]).entropy().item()  # alike in every state
        writer.add_scalar("losses/value_loss", fit.loss, global_step)
        writer.add_scalar("losses/explained_variance", fit.explained_variance_before, global_step)
        writer.add_scalar("losses/policy_loss", report.loss_after, global_step)
        writer.add_scalar("losses/approx_kl", report.kl, global_step)  # exact, not an estimate
        writer.add_scalar("losses/entropy", entropy, global_step)
        writer.add_scalar("charts/SPS", global_step / (time.time() - start_time), global_step)
    envs.close()
    writer.close()
    return episodes


if __name__ == "__main__":
    train(tyro.cli(Args))
