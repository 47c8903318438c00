"""Learn CartPole-v1 with TRPO. The whole loop is in this file: copy it and change it.

    python examples/cartpole.py --mode trpo --seed 0 --picture cartpole.png

An update has four parts: play 1024 steps, estimate advantages, improve the policy, fit the critic.
"""

from typing import Literal

import gymnasium as gym
import numpy as np
import torch
import tyro
from gymnasium.vector import AutoresetMode, SyncVectorEnv
from matplotlib import pyplot as plt
from torch import Tensor, nn
from torch.distributions import Categorical
from tqdm import trange

from trpo_optim import StepReport, TrustRegionOptimizer, frozen, mean_kl
from trpo_optim.rollouts import gae

Mode = Literal["trpo", "natural", "vanilla"]
ENVS, STEPS = 8, 128  # 8 environments side by side, 128 steps of each per update
GAMMA, LAMBDA = 0.99, 0.95  # discount; GAE's λ: 0 trusts the critic alone, 1 the rewards
MAX_KL = 0.01  # radius of the trust region in nats: how far one update may move the policy
LR = {"vanilla": 1.0}  # vanilla policy gradient has no radius: it needs a learning rate


def network(outputs: int) -> nn.Sequential:
    """Return a network that reads CartPole's four observations."""
    hidden = nn.Linear(4, 64), nn.Tanh(), nn.Linear(64, 64), nn.Tanh()
    return nn.Sequential(*hidden, nn.Linear(64, outputs))


def improve(
    optimizer: TrustRegionOptimizer, actor: nn.Module, obs: Tensor, act: Tensor, advantages: Tensor
) -> StepReport:
    """Take one step of the policy on a batch of B rows: (B, 4), (B,) and (B,)."""
    with torch.no_grad():  # the step measures how far the policy moves from this frozen copy
        old = frozen(Categorical(logits=actor(obs)))
        old_log_prob = old.log_prob(act)

    def closure() -> tuple[Tensor, Tensor, Categorical]:  # loss, KL, new policy
        new = Categorical(logits=actor(obs))
        ratio = (new.log_prob(act) - old_log_prob).exp()
        return -(ratio * advantages).mean(), mean_kl(old, new), new

    return optimizer.step(closure)  # no zero_grad() and no backward()


def draw(episodes: list[tuple[int, float]], kls: list[float], title: str) -> None:
    """Draw the return of every episode and the KL of every update."""
    plt.rcParams["font.size"] = 15  # readable on a phone
    _, (top, bottom) = plt.subplots(2, 1, figsize=(6, 7), layout="constrained")
    steps, returns = np.array(episodes).T
    means = np.convolve(returns, np.ones(20) / 20, mode="valid")
    top.plot(steps / 1000, returns, ".", color="#999999", markersize=3, label="episode")
    top.plot(steps[19:] / 1000, means, color="#0072B2", linewidth=2.5, label="mean of 20")
    top.set(title=title, xlabel="environment steps (thousands)", ylabel="return (steps upright)")
    bottom.plot(kls, "o", color="#0072B2", markersize=4, label="update")
    bottom.axhline(MAX_KL, color="#D55E00", linestyle="--", label="radius (max_kl)")
    scale = "log" if max(kls) > 3 * MAX_KL else "linear"
    bottom.set(xlabel="updates", ylabel="KL (nats)", yscale=scale)
    for axes in (top, bottom):
        axes.legend()


def train(
    mode: Mode = "trpo", seed: int = 0, total_steps: int = 100_000, picture: str = "cartpole.png"
) -> float:
    """Train one agent, draw the picture, return the mean return of the last 20 episodes."""
    torch.manual_seed(seed)
    torch.set_num_threads(1)  # more threads slow down networks this small
    # With SAME_STEP, the step that ends an episode also begins the next one: no row is wasted.
    makers = [lambda: gym.make("CartPole-v1")] * ENVS
    envs = SyncVectorEnv(makers, autoreset_mode=AutoresetMode.SAME_STEP)
    actor, critic = network(outputs=2), network(outputs=1)
    policy_opt = TrustRegionOptimizer(actor.parameters(), mode=mode, max_kl=MAX_KL, lr=LR.get(mode))
    critic_optimizer = torch.optim.Adam(critic.parameters(), lr=1e-3)
    obs, following = torch.zeros(2, STEPS, ENVS, 4)
    act, rewards = torch.zeros(STEPS, ENVS, dtype=torch.long), torch.zeros(STEPS, ENVS)
    terminated, done = torch.zeros(2, STEPS, ENVS, dtype=torch.bool)
    episodes, kls, running = [], [], np.zeros(ENVS)  # running: returns of unfinished episodes
    seen, _ = envs.reset(seed=seed)
    for update in (progress := trange(max(1, total_steps // (ENVS * STEPS)))):
        for t in range(STEPS):  # 1. Play.
            obs[t] = torch.as_tensor(seen)
            act[t] = Categorical(logits=actor(obs[t])).sample()  # sample() tracks no gradients
            seen, reward, fell, timed_out, info = envs.step(act[t].numpy())
            following[t] = torch.as_tensor(seen)
            for i in (fell | timed_out).nonzero()[0]:  # seen[i] already belongs to the next episode
                following[t, i] = torch.as_tensor(info["final_obs"][i])
            rewards[t] = torch.as_tensor((1 - GAMMA) * reward)  # values below 1 are learned faster
            terminated[t], done[t] = torch.as_tensor(fell), torch.as_tensor(fell | timed_out)
            running += reward
            episodes += [((update * STEPS + t + 1) * ENVS, x) for x in running[done[t].numpy()]]
            running[done[t].numpy()] = 0
        with torch.no_grad():  # 2. Estimate advantages. After a fall, the next value is 0.
            values = critic(obs).squeeze(-1)
            next_values = critic(following).squeeze(-1).masked_fill(terminated, 0.0)
        advantages = gae(rewards, values, next_values, done, gamma=GAMMA, gae_lambda=LAMBDA)
        batch, targets = obs.flatten(0, 1), (values + advantages).flatten()
        standardised = ((advantages - advantages.mean()) / advantages.std()).flatten()
        # 3. Improve the policy.  4. Fit the critic: ten passes, in minibatches of 128.
        kls.append(improve(policy_opt, actor, batch, act.flatten(), standardised).kl)
        for rows in torch.cat([torch.randperm(len(batch)) for _ in range(10)]).split(128):
            critic_optimizer.zero_grad()
            nn.functional.mse_loss(critic(batch[rows]).squeeze(-1), targets[rows]).backward()
            critic_optimizer.step()
        recent = float(np.mean([value for _, value in episodes[-20:]]))
        progress.set_postfix_str(f"return {recent:.0f}, KL {kls[-1]:.4f}")
    envs.close()
    draw(episodes, kls, f"CartPole-v1, {mode}, seed {seed}")
    plt.savefig(picture, dpi=120)
    return recent


if __name__ == "__main__":
    print(f"mean return of the last 20 episodes: {tyro.cli(train):.1f}")
