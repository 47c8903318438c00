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
from torch.distributions import Categorical, Distribution, Independent, Normal

from trpo_optim.snapshots import restorable

if TYPE_CHECKING:
    from train import Args


class WithoutInfo(gym.Wrapper[Any, Any, Any, Any]):
    """Leaves out what is not read here; vector environments would gather it at every step."""

    def step(self, action: Any) -> tuple[Any, Any, bool, bool, dict[str, Any]]:
        """Take a step and return it without its info."""
        return *self.env.step(action)[:4], {}


def make_envs(args: Args) -> SyncVectorEnv:
    """Return vector environments that restart within the step that ends an episode.

    Observations are flat; bounded actions go from −1 to 1.
    """

    def make() -> gym.Env[Any, Any]:
        env = restorable(partial(gym.make, args.env_id))
        space, actions = env.observation_space, env.action_space
        if isinstance(actions, gym.spaces.Box) and actions.is_bounded("both"):
            env = gym.wrappers.RescaleAction(env, np.float32(-1), np.float32(1))
        flat = isinstance(space, gym.spaces.Box) and len(space.shape) == 1
        return WithoutInfo(env if flat else gym.wrappers.FlattenObservation(env))

    return SyncVectorEnv([make] * args.num_envs, autoreset_mode=AutoresetMode.SAME_STEP)


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
        if isinstance(actions, gym.spaces.Discrete):
            outputs = int(actions.n)
        elif isinstance(actions, gym.spaces.Box):
            outputs = math.prod(actions.shape)
            log_std = (
                min(args.log_std - math.log(outputs), 0.0) if args.per_dimension else args.log_std
            )
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
        normal = Normal(output, self.log_std.exp(), validate_args=False)  # which takes time
        return Independent(normal, 1, validate_args=False)
