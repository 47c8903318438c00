"""TRPO for a recurrent policy with a shared trunk in one file, in the style of CleanRL."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

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

State = tuple[Tensor, Tensor]
Policy = Callable[[], Categorical]


@dataclass
class Args:
    """Settings of one run."""

    env_id: str = "CartPole-v1"
    observed: tuple[int, ...] = (0, 2)  # entries of the observation: no velocities
    seed: int = 1
    total_timesteps: int = 100_000
    num_envs: int = 8
    num_steps: int = 128  # of each environment per update
    gamma: float = 0.99
    gae_lambda: float = 0.95
    max_kl: float = 0.01  # nats
    critic_lr: float = 1e-3


class Agent(nn.Module):
    """Holds the trunk (encoder and LSTM) and two heads on it: actor and critic."""

    def __init__(self, inputs: int, choices: int) -> None:
        super().__init__()
        self.encoder = nn.Sequential(nn.Linear(inputs, 64), nn.Tanh())
        self.lstm = nn.LSTMCell(64, 64)
        self.actor = nn.Linear(64, choices)
        self.critic = nn.Sequential(nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, 1))
        nn.init.orthogonal_(self.actor.weight, 0.01)

    def trunk(self, obs: Tensor, state: State, starts: Tensor) -> tuple[Tensor, State]:
        """Return features (T·N, 64) and the next state. An episode's start clears the state."""
        outputs = []
        for encoded, start in zip(self.encoder(obs), starts, strict=True):
            keep = (1 - start)[:, None]
            state = self.lstm(encoded, (keep * state[0], keep * state[1]))
            outputs.append(state[0])
        return torch.cat(outputs), state

    def dist(self, obs: Tensor, state: State, starts: Tensor) -> Categorical:
        """Return the distribution over actions, of batch shape (T·N,)."""
        return Categorical(logits=self.actor(self.trunk(obs, state, starts)[0]))


def improve_policy(
    optimizer: TrustRegionOptimizer, policy: Policy, actions: Tensor, advantages: Tensor
) -> StepReport:
    """Take one step on whole sequences. It moves the actor and the trunk."""
    with torch.no_grad():
        old_dist = frozen(policy())
        old_log_prob = old_dist.log_prob(actions)
    advantages = (advantages - advantages.mean()) / (advantages.std() + 1e-8)

    def closure() -> tuple[Tensor, Tensor, Categorical]:
        dist = policy()
        ratio = (dist.log_prob(actions) - old_log_prob).exp()
        return -(ratio * advantages).mean(), mean_kl(old_dist, dist), dist

    return optimizer.step(closure)


def train(args: Args) -> list[float]:
    """Train one agent, and return the return of every finished episode in order."""
    torch.manual_seed(args.seed)
    writer = SummaryWriter(f"runs/{args.env_id}__trpo_lstm__{args.seed}__{int(time.time())}")

    makers = [lambda: gym.wrappers.RecordEpisodeStatistics(gym.make(args.env_id))] * args.num_envs
    envs = SyncVectorEnv(makers, autoreset_mode="SameStep")
    agent = Agent(len(args.observed), gym.spaces.flatdim(envs.single_action_space))
    # The policy's step moves the trunk and the actor. The critic's Adam moves the critic's head
    # alone: a critic's step through the trunk would change the policy outside the trust region.
    optimizer = TrustRegionOptimizer(agent.parameters(), max_kl=args.max_kl)
    critic_optimizer = torch.optim.Adam(agent.critic.parameters(), lr=args.critic_lr)
    obs = torch.zeros(args.num_steps, args.num_envs, len(args.observed))
    actions, rewards, values, next_values, starts, ended = torch.zeros(6, *obs.shape[:2])
    state = (torch.zeros(args.num_envs, 64), torch.zeros(args.num_envs, 64))
    episodes, global_step, start_time = list[float](), 0, time.time()
    next_obs = torch.as_tensor(envs.reset(seed=args.seed)[0])[:, args.observed]
    next_starts, none = torch.zeros(args.num_envs), torch.zeros(1, args.num_envs)

    while global_step + args.num_steps * args.num_envs <= args.total_timesteps:
        first_state = state
        for step in range(args.num_steps):
            global_step += args.num_envs
            obs[step], starts[step] = next_obs, next_starts
            with torch.no_grad():
                features, state = agent.trunk(next_obs[None], state, next_starts[None])
                actions[step] = action = Categorical(logits=agent.actor(features)).sample()
                values[step] = agent.critic(features).squeeze(-1)
            seen, reward, terminations, truncations, infos = envs.step(action.numpy())
            following = torch.as_tensor(seen).clone()
            rewards[step] = torch.as_tensor(reward)
            ended[step] = next_starts = torch.as_tensor(terminations | truncations).float()
            for i in np.flatnonzero(terminations | truncations):
                following[i] = torch.as_tensor(infos["final_obs"][i])
                episodes.append(float(infos["final_info"]["episode"]["r"][i]))
                writer.add_scalar("charts/episodic_return", episodes[-1], global_step)
                print(f"global_step={global_step}, episodic_return={episodes[-1]:.1f}")
            next_obs = torch.as_tensor(seen)[:, args.observed]
            with torch.no_grad():  # 0 after termination; after truncation V of the last observation
                features, _ = agent.trunk(following[None, :, args.observed], state, none)
                next_values[step] = agent.critic(features).squeeze(-1)
                next_values[step, terminations] = 0.0

        ended[-1] = 1.0
        advantages = gae(
            rewards, values, next_values, ended.bool(), gamma=args.gamma, gae_lambda=args.gae_lambda
        )
        targets = (advantages + values).flatten()
        policy = partial(agent.dist, obs, first_state, starts)
        report = improve_policy(optimizer, policy, actions.flatten(), advantages.flatten())
        with torch.no_grad():  # the trunk has moved, and gets no gradient from the critic
            features, _ = agent.trunk(obs, first_state, starts)
        fit = fit_value(agent.critic, features, targets, critic_optimizer, epochs=10, minibatch=128)
        writer.add_scalar("losses/value_loss", fit.loss, global_step)
        writer.add_scalar("losses/explained_variance", fit.explained_variance_before, global_step)
        writer.add_scalar("losses/policy_loss", report.loss_after, global_step)
        writer.add_scalar("losses/approx_kl", report.kl, global_step)  # exact, not an estimate
        writer.add_scalar("losses/entropy", policy().entropy().mean().item(), global_step)
        writer.add_scalar("charts/SPS", global_step / (time.time() - start_time), global_step)
    envs.close()
    writer.close()
    return episodes


if __name__ == "__main__":
    train(tyro.cli(Args))
