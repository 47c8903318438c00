"""What the sampling schemes give: variance by vine, returns, and returns by constraint.

    make bench-sampling

Writes the tables of docs/results/sampling.md.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from statistics import fmean
from typing import Any

import gymnasium as gym
import page
import torch
import train
import vine
import vine_agent
from gymnasium.vector import SyncVectorEnv
from table import records, table
from torch import Tensor
from workers import pool

from trpo_optim import rollouts

SAMPLES = 128
"""Values of Q in an objective whose gradient's variance is measured."""
REPEATS, SEEDS, WORKERS = 40, range(3), 2

CARTPOLE = vine.Args()
SWIMMER = vine.Args(
    env_id="Swimmer-v5",
    total_steps=500_000,
    trunk_steps=125,
    gamma=0.9999,
    gae_lambda=0.98,
)
CONSTRAINTS = (
    train.Args(constraint="mean", max_kl=0.01),
    train.Args(constraint="max", max_kl=0.01),
    train.Args(constraint="max", max_kl=0.1),
)


def gradient(agent: vine_agent.Agent, closure: Callable[[], Any]) -> Tensor:
    """Return the gradient of a closure's loss in the policy's parameters."""
    slopes = torch.autograd.grad(closure()[0], list(agent.policy.parameters()))
    return torch.cat([each.reshape(-1) for each in slopes])


def returns_of(path: rollouts.SinglePathBatch) -> Tensor:
    """Return discounted rewards to the end of each trajectory."""
    nothing = torch.zeros_like(path.rewards)
    return rollouts.discounted_returns(path.rewards, nothing, path.ends, gamma=0.95)


def made(env_id: str) -> tuple[SyncVectorEnv, vine_agent.Agent]:
    """Return environments, and an untrained policy with a critic that knows its values."""
    torch.manual_seed(0)
    envs = SyncVectorEnv([partial(gym.make, env_id)] * 8, autoreset_mode="SameStep")
    agent = vine_agent.Agent(envs)
    wide = rollouts.single_path(envs, agent.act, steps=1000, seed=5)
    rollouts.fit_value(
        agent.value,
        wide.flat(wide.observations),
        wide.flat(returns_of(wide)),
        torch.optim.Adam(agent.critic.parameters(), lr=3e-3),
        epochs=20,
        minibatch=256,
    )
    return envs, agent


def variances() -> str:
    """Return the table of variances: of differences of Q, and of gradients."""
    head = ["environment", "Q: independent random numbers", "Q: common random numbers", "ratio"]
    head += ["gradient: single path", "gradient: single path with a critic as baseline"]
    head += ["gradient: vine", "ratio", "simulator steps: single path", "simulator steps: vine"]
    rows = [head]
    for env_id in ("CartPole-v1", "Pendulum-v1", "Swimmer-v5"):
        envs, agent = made(env_id)
        branches = None if agent.discrete else 4
        vines = partial(
            rollouts.vine,
            envs,
            agent.act,
            steps=16,
            states=SAMPLES // (branches or 2),
            branches=branches,
            horizon=30,
            gamma=0.95,
        )
        differences, gradients, prices = [], [], []
        for seed in range(REPEATS):
            batches = [vines(common_random_numbers=common, seed=seed) for common in (False, True)]
            differences.append(torch.stack([each.q[:, 0] - each.q[:, 1] for each in batches]))
            path = rollouts.single_path(envs, agent.act, steps=16 + 30, seed=1000 + seed)
            path.valid[16:] = False  # 128 rows, each with 30 steps of what follows or more
            q = returns_of(path)
            with torch.no_grad():
                baseline = agent.value(path.observations)
            closures = (
                rollouts.policy_closure(agent.act, path, q),
                rollouts.policy_closure(agent.act, path, q - baseline),
                rollouts.vine_closure(agent.act, batches[1]),
            )
            gradients.append(torch.stack([gradient(agent, each) for each in closures]))
            prices.append(batches[1].steps)
        apart, together = torch.cat(differences, 1).var(1)
        spread = torch.stack(gradients).var(0).sum(1)  # single path, with the baseline, vine
        rows.append(
            [
                *(env_id, f"{apart:.3g}", f"{together:.3g}", f"{apart / together:.1f}"),
                *(f"{each:.3g}" for each in spread),
                f"{spread[0] / spread[2]:.1f}",
                *(str(path.rewards.numel()), f"{fmean(prices):.0f}"),
            ]
        )
    return table(*rows)


def final_return(args: vine.Args | train.Args) -> float:
    """Return the mean of the last 20 episodes of a run."""
    if isinstance(args, vine.Args):
        return vine.train(args).recent_return()
    folder = Path(f"runs/constraint/{args.constraint}{args.max_kl}__{args.seed}")
    return train.train(replace(args, run_dir=folder)).recent_return()


def learning(groups: Sequence[vine.Args] | Sequence[train.Args], names: Sequence[str]) -> str:
    """Return a table of returns: a row for some settings, which every seed makes a run of."""
    runs = [replace(args, seed=seed) for args in groups for seed in SEEDS]
    with pool(WORKERS) as workers:
        returns = workers.map(final_return, runs)
        return records(
            {name: getattr(args, name) for name in names}
            | {f"seed {seed}": f"{next(returns):.1f}" for seed in SEEDS}
            for args in groups
        )


def schemes() -> str:
    """Return the table of returns by sampling scheme."""
    settings = [
        replace(args, sampling=sampling)
        for args in (CARTPOLE, SWIMMER)
        for sampling in ("vine", "single-path")
    ]
    return learning(settings, ("env_id", "total_steps", "sampling"))


def constraints() -> str:
    """Return the table of returns by the KL that is held to the radius."""
    return learning(CONSTRAINTS, ("constraint", "max_kl"))


if __name__ == "__main__":
    tables = {"variances": variances, "schemes": schemes, "constraints": constraints}
    page.renew(Path("docs/results/sampling.md"), {"setting": page.setting, **tables})
