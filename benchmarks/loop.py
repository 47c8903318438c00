"""The whole training loop beside sb3-contrib's at equal settings, and where its time goes."""

from __future__ import annotations

import math

import gymnasium as gym
import normaliser
import torch
import train
from sb3_contrib import TRPO
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.vec_env import VecNormalize
from table import table
from timing import Job, taken_in_turn

from trpo_optim.rollouts import SinglePathBatch

BATCH = 2048
"""Environment steps of an update."""


def ours(env_id: str, count: int) -> dict[str, Job]:
    """Return the example's loop in parts: collecting, the policy's step, critic and scaling."""
    run = train.new_run(train.Args(env_id=env_id, num_envs=count, batch_size=BATCH, max_kl=0.05))
    last: list[SinglePathBatch] = []
    targets: list[torch.Tensor] = []

    def collect() -> None:
        last[:] = [train.collect(run)]

    def step() -> None:
        targets[:] = [train.improve_policy(run, last[0])[1]]

    def fit() -> None:
        train.fit_critic(run, last[0], targets[0])
        normaliser.follow(run, last[0].flat(last[0].observations))
        run.update += 1

    return {"collect": Job(collect), "policy": Job(step), "critic": Job(fit)}


def theirs(env_id: str, count: int) -> dict[str, Job]:
    """Return sb3-contrib's in two: collecting, and policy and critic together."""
    envs = VecNormalize(make_vec_env(env_id, count))
    actions = math.prod(envs.action_space.shape or ())
    model = TRPO(
        "MlpPolicy",
        envs,
        n_steps=BATCH // count,
        batch_size=128,
        n_critic_updates=20,
        cg_max_steps=10,
        target_kl=0.05 / actions,  # it averages over the action's dimensions
        device="cpu",
    )
    _, callback = model._setup_learn(10**9)
    buffer, length = model.rollout_buffer, BATCH // count
    return {
        "their collect": Job(lambda: model.collect_rollouts(envs, callback, buffer, length)),
        "their train": Job(model.train),
    }


def simulator(env_id: str) -> dict[str, Job]:
    """Return the environment's own share of collecting, by random actions."""
    env = gym.make(env_id).unwrapped
    env.reset(seed=0)
    env.action_space.seed(0)
    actions = [env.action_space.sample() for _ in range(BATCH)]

    def step() -> None:
        for action in actions:
            if env.step(action)[2]:
                env.reset()

    return {"simulator": Job(step)}


def loop_table(rounds: int) -> str:
    """Return the table of whole loops on one core.

    Args:
        rounds: Timed updates of each.

    Returns:
        Markdown.
    """
    torch.set_num_threads(1)
    head = ["task", "environments", "simulator (ms)"]
    head += ["collect (ms)", "policy (ms)", "critic and scaling (ms)"]
    head += ["sb3-contrib: collect (ms)", "sb3-contrib: policy and critic (ms)"]
    rows = [[*head, "trpo_optim (steps/s)", "sb3-contrib (steps/s)", "ratio"]]
    for env_id in ("Hopper-v5", "HalfCheetah-v5", "CartPole-v1"):
        for count in (2, 8):
            jobs = {**simulator(env_id), **ours(env_id, count), **theirs(env_id, count)}
            times = {name: each.median for name, each in taken_in_turn(jobs, rounds).items()}
            mine = times["collect"] + times["policy"] + times["critic"]
            other = times["their collect"] + times["their train"]
            rows.append(
                [
                    env_id,
                    str(count),
                    *(f"{1e3 * each:.0f}" for each in times.values()),
                    f"{BATCH / mine:.0f}",
                    f"{BATCH / other:.0f}",
                    f"{other / mine:.2f}",
                ]
            )
    return table(*rows)
