"""What the sampling schemes cost and give: speed of collecting, variance by vine, returns.

    make bench-sampling

Writes docs/results/sampling.md.
"""

from __future__ import annotations

import platform
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from functools import partial
from importlib.metadata import version
from pathlib import Path
from statistics import fmean
from typing import Any

import gymnasium as gym
import torch
import train
import tyro
import vine
import vine_agent
from gymnasium.vector import SyncVectorEnv
from loop import BATCH, theirs
from table import table
from timing import Job, taken_in_turn
from torch import Tensor

from trpo_optim import rollouts

SAMPLES = 128
"""Values of Q in an objective whose gradient's variance is measured."""

SEEDS = range(3)

CARTPOLE = vine.Args()
SWIMMER = vine.Args(
    env_id="Swimmer-v5",
    total_steps=500_000,
    trunk_steps=125,
    gamma=0.9999,
    gae_lambda=0.98,
)


def ours(env_id: str, count: int) -> Job:
    """Return the job of collecting a batch by the example: advantages and all."""
    run = train.new_run(train.Args(env_id=env_id, num_envs=count, batch_size=BATCH))

    def collect() -> None:
        batch = train.collect(run)
        train.advantages(run, batch, train.scaled_rewards(run, batch))

    return Job(collect)


def collecting(rounds: int) -> str:
    """Return the table of environment steps a second on one core."""
    torch.set_num_threads(1)
    rows = [
        ["environment", "environments", "trpo_optim (steps/s)", "sb3-contrib (steps/s)", "ratio"]
    ]
    for env_id in ("Hopper-v5", "CartPole-v1"):
        for count in (1, 4, 16):
            times = taken_in_turn(
                {"ours": ours(env_id, count), "theirs": theirs(env_id, count)["their collect"]},
                rounds,
            )
            speeds = [f"{BATCH / times[name].median:.0f}" for name in ("ours", "theirs")]
            rows.append([env_id, str(count), *speeds, times["theirs"].over(times["ours"])])
    return table(*rows)


def gradient(agent: vine_agent.Agent, closure: Callable[[], Any]) -> Tensor:
    """Return the gradient of a closure's loss in the policy's parameters."""
    slopes = torch.autograd.grad(closure()[0], list(agent.policy.parameters()))
    return torch.cat([each.reshape(-1) for each in slopes])


def variances(repeats: int) -> str:
    """Return the table of variances: of differences of Q, and of gradients."""
    head = ["environment", "Q: independent random numbers", "Q: common random numbers", "ratio"]
    head += ["gradient: single path", "gradient: single path with a critic as baseline"]
    head += ["gradient: vine", "ratio", "simulator steps: single path", "simulator steps: vine"]
    rows = [head]
    for env_id in ("CartPole-v1", "Pendulum-v1", "Swimmer-v5"):
        torch.manual_seed(0)
        envs = SyncVectorEnv([partial(gym.make, env_id)] * 8, autoreset_mode="SameStep")
        agent = vine_agent.Agent(envs)
        branches = None if agent.discrete else 4
        wide = rollouts.single_path(envs, agent.act, steps=1000, seed=5)
        rollouts.fit_value(
            agent.value,
            wide.flat(wide.observations),
            wide.flat(returns_of(wide)),
            torch.optim.Adam(agent.critic.parameters(), lr=3e-3),
            epochs=20,
            minibatch=256,
        )
        differences: dict[bool, list[Tensor]] = {True: [], False: []}
        gradients: dict[str, list[Tensor]] = {"vine": [], "path": [], "baseline": []}
        prices = []
        for seed in range(repeats):
            for common, found in differences.items():
                batch = rollouts.vine(
                    envs,
                    agent.act,
                    steps=16,
                    states=SAMPLES // (branches or 2),
                    branches=branches,
                    horizon=30,
                    gamma=0.95,
                    common_random_numbers=common,
                    seed=seed,
                )
                found.append(batch.q[:, 0] - batch.q[:, 1])
                if common:
                    closure = rollouts.vine_closure(agent.act, batch)
                    gradients["vine"].append(gradient(agent, closure))
                    prices.append(batch.steps)
            path = rollouts.single_path(envs, agent.act, steps=16 + 30, seed=1000 + seed)
            path.valid[16:] = False  # 128 rows, each with 30 steps of what follows or more
            q = returns_of(path)
            with torch.no_grad():
                baseline = agent.value(path.observations)
            for name, advantages in (("path", q), ("baseline", q - baseline)):
                closure = rollouts.policy_closure(agent.act, path, advantages)
                gradients[name].append(gradient(agent, closure))
        apart, together = (float(torch.cat(differences[each]).var()) for each in (False, True))
        spread = {name: float(torch.stack(each).var(0).sum()) for name, each in gradients.items()}
        rows.append(
            [
                env_id,
                f"{apart:.3g}",
                f"{together:.3g}",
                f"{apart / together:.1f}",
                f"{spread['path']:.3g}",
                f"{spread['baseline']:.3g}",
                f"{spread['vine']:.3g}",
                f"{spread['path'] / spread['vine']:.1f}",
                str(path.rewards.numel()),
                f"{fmean(prices):.0f}",
            ]
        )
    return table(*rows)


def returns_of(path: rollouts.SinglePathBatch) -> Tensor:
    """Return discounted rewards to the end of each trajectory."""
    nothing = torch.zeros_like(path.rewards)
    return rollouts.discounted_returns(path.rewards, nothing, path.ends, gamma=0.95)


def final_return(args: vine.Args | train.Args) -> float:
    """Return the mean of the last 20 episodes of a run."""
    run = train.train(args) if isinstance(args, train.Args) else vine.train(args)
    return run.recent_return()


def learning(workers: int, folder: Path) -> tuple[str, str]:
    """Return the tables of returns: by sampling scheme, and by constraint."""
    schemes = [
        replace(args, sampling=sampling, seed=seed)
        for args in (CARTPOLE, SWIMMER)
        for sampling in ("vine", "single-path")
        for seed in SEEDS
    ]
    constraints = [
        replace(args, seed=seed, run_dir=folder / f"{args.constraint}{args.max_kl}{seed}")
        for args in (
            train.Args(constraint="mean", max_kl=0.01),
            train.Args(constraint="max", max_kl=0.01),
            train.Args(constraint="max", max_kl=0.1),
        )
        for seed in SEEDS
    ]
    with ProcessPoolExecutor(workers) as pool:
        by_scheme = list(pool.map(final_return, schemes))
        by_constraint = list(pool.map(final_return, constraints))
    count = len(SEEDS)
    first = [["environment", "simulator steps", "sampling", *(f"seed {seed}" for seed in SEEDS)]]
    for index in range(0, len(schemes), count):
        args = schemes[index]
        values = [f"{value:.1f}" for value in by_scheme[index : index + count]]
        first.append([args.env_id, str(args.total_steps), args.sampling, *values])
    second = [["constraint", "max_kl", *(f"seed {seed}" for seed in SEEDS)]]
    for index in range(0, len(constraints), count):
        values = [f"{value:.1f}" for value in by_constraint[index : index + count]]
        second.append([constraints[index].constraint, str(constraints[index].max_kl), *values])
    return table(*first), table(*second)


PAGE = """# What sampling costs and gives

`make bench-sampling` wrote this page on {cores} CPU cores ({machine}), with torch {torch} and
sb3-contrib {sb3}.

## Collecting

The table shows environment steps per second on one core, for batches of {steps} steps. The time
includes normalised observations, scaled rewards, values and the advantages of GAE. Policy and
critic have two hidden layers of 64 tanh units. The libraries run in turns. The ratio is the ratio
of the medians of {rounds} rounds. The quartiles of the rounds' own ratios are in brackets.

{collecting}

## Variance

The policies are untrained. The left part of the table shows the variance of Q(s, a) − Q(s, b) for
two actions tried from the same state, with independent and with common random numbers. On CartPole,
vine tries all actions. In the other environments, the policy draws the two actions.

The middle part shows the variance of the gradient of the surrogate: the trace of its covariance
over {repeats} repeats. Each gradient uses {samples} values of Q. The right part counts the
simulator steps that these values take. The paper compares the variance for the same number of
values of Q. Vine needs more simulator steps for them.

{variances}

On CartPole, the branches of a state soon differ, so common random numbers help little.

## Learning

The table shows the mean return of the last 20 episodes of the trajectories.
`examples/advanced/vine.py` ran vine and single path (with GAE) for the same number of simulator
steps. The settings are `CARTPOLE` and `SWIMMER` in `benchmarks/sampling.py`.

{schemes}

On Swimmer, single path is ahead in every run of the table. The runs of vine differ: its seed 3
ends at 244. In an earlier version, from other starts, vine ended at 287, 241 and 289, and single
path ended at 332, 99 and 327.

## The largest KL

The table shows the same mean return for `examples/advanced/train.py` on CartPole-v1, after 100 000
steps. The runs differ in the KL that is held to `max_kl`: the mean of the batch, or the largest of
a sample.

{constraints}

"""


def main(
    rounds: int = 9,
    repeats: int = 40,
    workers: int = 2,
    path: Path = Path("docs/results/sampling.md"),
) -> None:
    """Measure, and write the page.

    Args:
        rounds: Timed rounds.
        repeats: Batches behind a variance.
        workers: Processes that train side by side.
        path: Where the page goes.
    """
    collected = collecting(rounds)
    spread = variances(repeats)
    schemes, constraints = learning(workers, Path("runs/constraint"))
    path.write_text(
        PAGE.format(
            cores=workers,
            machine=platform.machine(),
            torch=version("torch"),
            sb3=version("sb3-contrib"),
            steps=BATCH,
            rounds=rounds,
            samples=SAMPLES,
            repeats=repeats,
            collecting=collected,
            variances=spread,
            schemes=schemes,
            constraints=constraints,
        ),
        encoding="utf-8",
    )


if __name__ == "__main__":
    tyro.cli(main)
