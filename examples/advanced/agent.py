"""What acts in the training example: environments, and the networks of policy and critic."""

from __future__ import annotations

import math
from functools import partial
from typing import TYPE_CHECKING, Any

import gymnasium as gym
import numpy as np
import torch
from gymnasium.vector import AutoresetMode, SyncVectorEnv
from torch import Tensor, nn
from torch.distributions import Beta, Categorical, Distribution, Independent, Normal
from torch.nn.functional import softplus

from trpo_optim.snapshots import restorable

if TYPE_CHECKING:
    from train import Args


class WithoutInfo(gym.Wrapper[Any, Any, Any, Any]):
    """Leaves out what is not read here; vector environments would gather it at every step."""

    def step(self, action: Any) -> tuple[Any, Any, bool, bool, dict[str, Any]]:
        """Take a step and return it without its info."""
        return *self.env.step(action)[:4], {}


class Staggered(gym.Wrapper[Any, Any, Any, Any]):
    """Cuts the first episode.

    Args:
        env: The environment.
        first: The most steps of its first episode.
    """

    def __init__(self, env: gym.Env[Any, Any], first: int) -> None:
        super().__init__(env)
        self.left = first

    def step(self, action: Any) -> tuple[Any, Any, bool, bool, dict[str, Any]]:
        """Take a step; the first episode is truncated where it is to be cut."""
        observation, reward, terminated, truncated, info = self.env.step(action)
        if self.left > 0:
            truncated = truncated or self.left == 1
            self.left = 0 if terminated or truncated else self.left - 1
        return observation, reward, terminated, truncated, info


def make_envs(args: Args) -> SyncVectorEnv:
    """Return vector environments that restart within the step that ends an episode.

    Observations are flat; bounded actions go from −1 to 1, or from 0 to 1 for a beta distribution.
    """

    def make(index: int) -> gym.Env[Any, Any]:
        env = restorable(partial(gym.make, args.env_id))
        if args.stagger and env.spec is not None and env.spec.max_episode_steps:
            env = Staggered(env, env.spec.max_episode_steps * (index + 1) // args.num_envs)
        space, actions = env.observation_space, env.action_space
        if isinstance(actions, gym.spaces.Box) and actions.is_bounded("both"):
            low = np.float32(0 if args.actions == "beta" else -1)  # where its actions begin
            env = gym.wrappers.RescaleAction(env, low, np.float32(1))
        flat = isinstance(space, gym.spaces.Box) and len(space.shape) == 1
        return WithoutInfo(env if flat else gym.wrappers.FlattenObservation(env))

    makers = [partial(make, index) for index in range(args.num_envs)]
    return SyncVectorEnv(makers, autoreset_mode=AutoresetMode.SAME_STEP)


def mlp(inputs: int, hidden: int, outputs: int, gain: float) -> nn.Sequential:
    """Return a network of two tanh layers, orthogonally initialised."""

    def layer(fan_in: int, fan_out: int, scale: float) -> nn.Linear:
        linear = nn.Linear(fan_in, fan_out)
        nn.init.orthogonal_(linear.weight, scale)
        nn.init.zeros_(linear.bias)
        return linear

    first, second = layer(inputs, hidden, math.sqrt(2)), layer(hidden, hidden, math.sqrt(2))
    return nn.Sequential(first, nn.Tanh(), second, nn.Tanh(), layer(hidden, outputs, gain))


class Policy(nn.Module):
    """Maps normalised observations to a distribution over actions."""

    def __init__(self, observations: int, actions: gym.Space[Any], args: Args) -> None:
        super().__init__()
        self.discrete = isinstance(actions, gym.spaces.Discrete)
        self.beta = args.actions == "beta"
        if isinstance(actions, gym.spaces.Discrete):
            outputs = int(actions.n)
        elif isinstance(actions, gym.spaces.Box):
            outputs = math.prod(actions.shape)
            log_std = (
                min(args.log_std - math.log(outputs), 0.0) if args.per_dimension else args.log_std
            )
            if self.beta:
                if not actions.is_bounded("both"):
                    raise SystemExit(
                        f"{args.env_id} has the action space {actions}; a beta distribution needs "
                        "bounds. Choose --actions normal."
                    )
                # If both parameters of the distribution are a, its variance on (−1, 1) is 1/(2a+1).
                both = max((math.exp(-2 * log_std) - 1) / 2, 1.1)
                self.shift = math.log(math.expm1(both - 1))
                outputs *= 2
            else:
                self.log_std = nn.Parameter(torch.full((outputs,), log_std))
        else:
            raise SystemExit(
                f"{args.env_id} has the action space {actions}; this loop knows Box and Discrete."
            )
        self.network = mlp(observations, args.hidden, outputs, gain=0.01)

    def forward(self, observation: Tensor) -> Distribution:
        """Return the distribution over actions, joint over their dimensions."""
        output = self.network(observation)
        if self.discrete:
            return Categorical(logits=output)
        if self.beta:  # above 1: the density has one peak
            towards_one, towards_zero = (1 + softplus(output + self.shift)).chunk(2, -1)
            beta = Beta(towards_one, towards_zero, validate_args=False)
            return Independent(beta, 1, validate_args=False)
        normal = Normal(output, self.log_std.exp(), validate_args=False)  # which takes time
        return Independent(normal, 1, validate_args=False)
