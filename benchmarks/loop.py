"""The whole training loop beside sb3-contrib's at equal settings, and where its time goes.

    make bench

It fills a table of docs/results/speed.md.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from statistics import median

import gymnasium as gym
import page
import train
from sb3_contrib import TRPO
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.vec_env import VecNormalize
from table import records
from timing import Job, taken_in_turn

from trpo_optim.rollouts import SinglePathBatch

BATCH, ROUNDS = 2048, 9
"""Environment steps of an update, and timed updates."""
CASES = [(name, n) for name in ("Hopper-v5", "HalfCheetah-v5", "CartPole-v1") for n in (2, 8)]

Parts = dict[str, Callable[[], object]]
"""Parts of an update by the heads of their columns, in the order in which they run."""


def ours(env_id: str, count: int) -> Parts:
    """Return the example's loop in two parts."""
    run = train.new_run(train.Args(env_id=env_id, num_envs=count, batch_size=BATCH, max_kl=0.05))
    batches: list[SinglePathBatch] = []

    def improve() -> None:
        train.improve(run, batches.pop())
        run.update += 1

    return {
        "collect (ms)": lambda: batches.append(train.collect(run)),
        "policy and critic (ms)": improve,
    }


def theirs(env_id: str, count: int) -> Parts:
    """Return sb3-contrib's loop in two parts."""
    envs = VecNormalize(make_vec_env(env_id, count))
    model = TRPO(
        "MlpPolicy",
        envs,
        n_steps=BATCH // count,
        batch_size=128,
        n_critic_updates=20,
        cg_max_steps=10,
        target_kl=0.05 / math.prod(envs.action_space.shape or ()),  # it averages over dimensions
        device="cpu",
    )
    _, callback = model._setup_learn(10**9)
    rollout = callback, model.rollout_buffer, BATCH // count
    return {
        "sb3-contrib: collect (ms)": lambda: model.collect_rollouts(envs, *rollout),
        "sb3-contrib: policy and critic (ms)": model.train,
    }


def simulator(env_id: str) -> Parts:
    """Return the environment's own share of collecting, by random actions."""
    env = gym.make(env_id).unwrapped
    env.reset(seed=0)
    env.action_space.seed(0)
    actions = [env.action_space.sample() for _ in range(BATCH)]

    def step() -> None:
        for action in actions:
            if env.step(action)[2]:
                env.reset()

    return {"simulator (ms)": step}


def loops() -> str:
    """Return the table of whole loops on one core."""
    rows = []
    for env_id, count in CASES:
        parts = {**simulator(env_id), **ours(env_id, count), **theirs(env_id, count)}
        times = taken_in_turn({name: Job(part) for name, part in parts.items()}, ROUNDS)
        ms = {name: 1e3 * median(each) for name, each in times.items()}
        _, collect, improve, *others = ms.values()
        figures = {name: f"{each:.0f}" for name, each in ms.items()}
        ratio = f"{sum(others) / (collect + improve):.2f}"
        rows.append({"task": env_id, "environments": count, **figures, "ratio": ratio})
    return records(rows)


if __name__ == "__main__":
    page.renew(Path("docs/results/speed.md"), {"loop": loops})
