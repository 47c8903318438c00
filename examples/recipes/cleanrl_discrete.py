"""TRPO for discrete actions in one file, for people who write CleanRL-style loops."""

from __future__ import annotations

import math
import time
from dataclasses import dataclass

import gymnasium as gym
import numpy as np
import torch
import tyro
from gymnasium.vector import SyncVectorEnv
from torch import Tensor, nn
from torch.distributions import Categorical
from torch.utils.tensorboard import SummaryWriter

from trpo_optim import StepReport, TrustRegionOptimizer, frozen, mean_kl
from trpo_optim.rollouts import fit_value, gae


@dataclass
class Args:
    """Settings of one run."""

    env_id: str = "CartPole-v1"
    seed: int = 1
    total_timesteps: int = 100_000
    num_envs: int = 4
    num_steps: int = 256  # of each environment per update
    gamma: float = 0.99
    gae_lambda: float = 0.95
    max_kl: float = 0.01  # nats
    critic_lr: float = 1e-3


def mlp(inputs: int, outputs: int, gain: float) -> nn.Sequential:
    """Return a network of two tanh layers, orthogonally initialised."""
    layers = [nn.Linear(inputs, 64), nn.Linear(64, 64), nn.Linear(64, outputs)]
    for layer, scale in zip(layers, (math.sqrt(2), math.sqrt(2), gain), strict=True):
        nn.init.orthogonal_(layer.weight, scale)
        nn.init.zeros_(layer.bias)
    return nn.Sequential(layers[0], nn.Tanh(), layers[1], nn.Tanh(), layers[2])


class Agent(nn.Module):
    """Holds actor and critic."""

    def __init__(self, inputs: int, choices: int) -> None:
        super().__init__()
        self.critic = mlp(inputs, 1, gain=1.0)
        self.actor = mlp(inputs, choices, gain=0.01)

    def dist(self, obs: Tensor) -> Categorical:
        """Return the distribution over actions."""
        return Categorical(logits=self.actor(obs))


def improve_policy(
    agent: Agent, optimizer: TrustRegionOptimizer, obs: Tensor, actions: Tensor, advantages: Tensor
) -> StepReport:
    """Take one step on the whole batch. It replaces PPO's epochs of clipped minibatches."""
    with torch.no_grad():
        old_dist = frozen(agent.dist(obs))
        old_log_prob = old_dist.log_prob(actions)
    advantages = (advantages - advantages.mean()) / (advantages.std() + 1e-8)

    def closure() -> tuple[Tensor, Tensor, Categorical]:
        dist = agent.dist(obs)
        ratio = (dist.log_prob(actions) - old_log_prob).exp()
        return -(ratio * advantages).mean(), mean_kl(old_dist, dist), dist

    return optimizer.step(closure)


def train(args: Args) -> list[float]:
    """Train one agent, and return the return of every finished episode in order."""
    torch.manual_seed(args.seed)
    writer = SummaryWriter(f"runs/{args.env_id}__trpo__{args.seed}__{int(time.time())}")

    def make_env() -> gym.Env[np.ndarray, np.int64]:
        return gym.wrappers.RecordEpisodeStatistics(gym.make(args.env_id))

    envs = SyncVectorEnv([make_env] * args.num_envs, autoreset_mode="SameStep")
    inputs = gym.spaces.flatdim(envs.single_observation_space)
    agent = Agent(inputs, gym.spaces.flatdim(envs.single_action_space))
    # The closure does not reach the critic, so this optimizer leaves the critic as it is.
    optimizer = TrustRegionOptimizer(agent.parameters(), max_kl=args.max_kl)
    critic_optimizer = torch.optim.Adam(agent.critic.parameters(), lr=args.critic_lr)
    obs, following = torch.zeros(2, args.num_steps, args.num_envs, inputs)
    actions, rewards, terminated, ended = torch.zeros(4, args.num_steps, args.num_envs)
    episodes, global_step, start_time = list[float](), 0, time.time()
    next_obs = torch.as_tensor(envs.reset(seed=args.seed)[0])

    while global_step + args.num_steps * args.num_envs <= args.total_timesteps:
        for step in range(args.num_steps):
            global_step += args.num_envs
            obs[step] = next_obs
            with torch.no_grad():
                actions[step] = action = agent.dist(obs[step]).sample()
            seen, reward, terminations, truncations, infos = envs.step(action.numpy())
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
        report = improve_policy(agent, optimizer, b_obs, actions.flatten(), advantages.flatten())
        fit = fit_value(agent.critic, b_obs, targets, critic_optimizer, epochs=10, minibatch=128)
        entropy = agent.dist(b_obs).entropy().mean().item()
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
