"""Learn a MuJoCo task by TRPO: settings of docs/results/settings.md, but no advantage floor.

Run ``python examples/continuous.py --env-id Hopper-v5 --mode trpo --seed 0``.
"""

import math
from typing import Literal

import gymnasium as gym
import numpy as np
import torch
import tyro
from gymnasium.wrappers import RescaleAction
from gymnasium.wrappers.vector import NormalizeObservation
from matplotlib import pyplot as plt
from torch import Tensor, nn
from torch.distributions import Distribution, Independent, Normal
from tqdm import trange

from trpo_optim import TrustRegionOptimizer
from trpo_optim.rollouts import SinglePathBatch, fit_value, gae, policy_closure, single_path

ENVS, STEPS = 4, 512  # 4 environments side by side, 512 steps of each per update
GAMMA, LAMBDA, LONG = 0.99, 0.9, 0.95  # LONG is λ for the critic, which needs longer traces
KL_PER_DIMENSION = 0.007  # in nats; the radius grows with the action's dimensions
STD = math.exp(0.8)  # initial standard deviation: this over the action's dimensions, at most 1
LR = {"trpo": 1.0, "natural": 1.0, "vanilla": 0.1}  # 1.0: steps as long as the radius allows


def network(inputs: int, outputs: int, gain: float) -> nn.Sequential:
    """Return two hidden layers of 64 units; ``gain`` scales the first outputs."""
    first, second, last = nn.Linear(inputs, 64), nn.Linear(64, 64), nn.Linear(64, outputs)
    for layer, scale in ((first, math.sqrt(2)), (second, math.sqrt(2)), (last, gain)):
        nn.init.orthogonal_(layer.weight, scale)
        nn.init.zeros_(layer.bias)
    return nn.Sequential(first, nn.Tanh(), second, nn.Tanh(), last)


class Policy(nn.Module):
    """A Gaussian policy whose standard deviation does not depend on the observation."""

    def __init__(self, observations: int, actions: int) -> None:
        super().__init__()
        self.mean = network(observations, actions, gain=0.01)  # first means near 0
        self.log_std = nn.Parameter(torch.full((actions,), math.log(min(STD / actions, 1.0))))

    def forward(self, observations: Tensor) -> Distribution:
        """Return the distribution; Independent makes its last dimension one action."""
        return Independent(Normal(self.mean(observations), self.log_std.exp()), 1)


def estimate(batch: SinglePathBatch, critic: nn.Module, gae_lambda: float) -> tuple[Tensor, Tensor]:
    """Return values and advantages, (T, N). Rewards are scaled so that values are near 1."""
    values, following = batch.values(critic)
    rewards = (1 - GAMMA) * batch.rewards
    return values, gae(rewards, values, following, batch.ends, gamma=GAMMA, gae_lambda=gae_lambda)


def draw(episodes: list[tuple[int, float]], kls: list[tuple[float, float]], title: str) -> None:
    """Draw the return of every episode, and the KL of every update beside the radius."""
    plt.rcParams["font.size"] = 15  # readable on a phone
    _, (top, bottom) = plt.subplots(2, 1, figsize=(6, 7), layout="constrained")
    steps, returns = np.array(episodes or [(0, np.nan)]).T
    means = [returns[max(0, end - 20) : end].mean() for end in range(1, len(returns) + 1)]
    top.plot(steps / 1000, returns, ".", color="#999999", markersize=3, label="episode")
    top.plot(steps / 1000, means, color="#0072B2", linewidth=2.5, label="mean of 20")
    top.set(title=title, xlabel="environment steps (thousands)", ylabel="return")
    measured, radii = np.array(kls).T
    bottom.plot(measured, "o", color="#0072B2", markersize=4, label="update")
    bottom.plot(radii, color="#D55E00", linestyle="--", label="radius (max_kl)")
    bottom.set(xlabel="updates", ylabel="KL (nats)", yscale="log")
    for axes in (top, bottom):
        axes.legend()


def train(
    env_id: str = "Hopper-v5",
    mode: Literal["trpo", "natural", "vanilla"] = "trpo",
    seed: int = 0,
    total_steps: int = 200_000,
    picture: str = "continuous.png",
) -> float:
    """Train one agent, draw the picture, return the mean return of the last 20 episodes."""
    torch.manual_seed(seed)
    torch.set_num_threads(1)  # more threads slow down networks this small
    # Observations with mean 0 and variance 1, and actions from -1 to 1, suit one set of settings.
    wrappers = [lambda env: RescaleAction(env, np.float32(-1), np.float32(1))]
    envs = NormalizeObservation(gym.make_vec(env_id, ENVS, "sync", wrappers=wrappers))
    observations = math.prod(envs.single_observation_space.shape or ())
    actions = math.prod(envs.single_action_space.shape or ())
    policy, critic = Policy(observations, actions), network(observations, 1, gain=1.0)
    radius = KL_PER_DIMENSION * actions
    policy_opt = TrustRegionOptimizer(policy.parameters(), mode=mode, max_kl=radius, lr=LR[mode])
    critic_opt = torch.optim.Adam(critic.parameters(), lr=1e-3)
    episodes, kls, batch = [], [], None
    batches: list[SinglePathBatch] = []
    updates = max(1, total_steps // (ENVS * STEPS))
    for update in (progress := trange(updates)):
        batch = single_path(envs, policy, steps=STEPS, after=batch, seed=None if batch else seed)
        length = min(1.0, 2 - 2 * update / updates)  # steps become shorter from half on
        policy_opt.param_groups[0]["lr"] = length * LR[mode]
        _, advantages = estimate(batch, critic, LAMBDA)
        report = policy_opt.step(policy_closure(policy, batch, advantages, standardise=True))
        batches = [batch, *batches[:3]]  # four batches teach the critic more than one
        rows = [one.flat((one.observations, sum(estimate(one, critic, LONG)))) for one in batches]
        seen, targets = map(torch.cat, zip(*rows, strict=True))
        fit_value(critic, seen, targets, critic_opt, epochs=5, minibatch=128)
        ends = (update * STEPS + (batch.terminated | batch.truncated).nonzero()[:, 0] + 1) * ENVS
        episodes.extend([*zip(ends.tolist(), batch.episode_returns, strict=True)])
        kls.append((report.kl, radius * length**2))  # the KL grows with the square of the length
        recent = float(np.mean([value for _, value in episodes[-20:]] or [np.nan]))
        progress.set_postfix_str(f"return {recent:.0f}, KL {report.kl:.4f}")
    envs.close()
    draw(episodes, kls, f"{env_id}, {mode}, seed {seed}")
    plt.savefig(picture, dpi=120)
    return recent


if __name__ == "__main__":
    print(f"mean return of the last 20 episodes: {tyro.cli(train):.1f}")
