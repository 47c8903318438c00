"""The tasks of the learning benchmark, with the settings, the targets and the published returns."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import train

MUJOCO = train.Args(
    total_steps=1_000_000,
    anneal_start=500_000,
    anneal_steps=1_000_000,
    num_envs=4,
    batch_size=2048,
    max_kl=0.007,
    lr=1.0,
    log_std=0.8,
    per_dimension=True,
    gae_lambda=0.95,
    critic_batches=4,
    critic_epochs=5,
)
SWIMMER = replace(MUJOCO, gamma=0.998, gae_lambda=0.99)
"""By the same rule λ = 1 − 5(1 − γ)."""
CLASSIC = train.Args(
    max_kl=0.03,
    lr=1.0,
    log_std=1.0,
    gamma=0.995,
    gae_lambda=0.975,
    critic_batches=4,
    critic_epochs=10,
)
VANILLA_LR = 0.01
"""Learning rate of vanilla policy gradient, on all tasks; not tuned."""

ZOO: dict[str, Any] = {
    "normalize": True,
    "n_steps": 1024,
    "batch_size": 128,
    "gamma": 0.99,
    "gae_lambda": 0.95,
    "cg_max_steps": 25,
    "cg_damping": 0.1,
    "n_critic_updates": 20,
    "learning_rate": 1e-3,
}
"""What hyperparams/trpo.yml of rl-baselines3-zoo gives for MuJoCo, with two environments."""
CARTPOLE = {"n_steps": 512, "batch_size": 512, "cg_damping": 1e-3, "gae_lambda": 0.98}
LANDER = {"n_steps": 512, "cg_damping": 0.01, "gae_lambda": 0.98, "n_critic_updates": 15}
PENDULUM = {"n_steps": 1024, "gamma": 0.9, "n_critic_updates": 15}
NOISE = {"use_sde": True, "sde_sample_freq": 4}


@dataclass(frozen=True)
class Task:
    """What is run on a task, and what its returns are compared with.

    Attributes:
        args: This package's earlier settings; see ``adopted``.
        target: The return to be reached.
        published: The best published return on this version of the task, and whose it is.
        zoo: The settings of sb3-contrib's TRPO, if rl-baselines3-zoo has an entry.
    """

    args: train.Args
    target: float | None
    published: str
    zoo: dict[str, Any] | None = None


def classic(steps: int) -> train.Args:
    """Return the settings of classic control for a budget: that of rl-baselines3-zoo's TRPO."""
    return replace(CLASSIC, total_steps=steps, anneal_steps=steps)


TASKS = {
    "HalfCheetah-v5": Task(MUJOCO, 6300, "5371 (XuanCe, PPO)", ZOO | {"target_kl": 0.04}),
    "Hopper-v5": Task(MUJOCO, 3400, "2133 (XuanCe, PPO)", ZOO),
    "Walker2d-v5": Task(MUJOCO, 5300, "3203 (XuanCe, PPO)", ZOO),
    "Ant-v5": Task(MUJOCO, 3600, "1149 (XuanCe, PPO)", ZOO),
    "Humanoid-v5": Task(MUJOCO, 1030, "599 (XuanCe, PPO)", ZOO),
    "HumanoidStandup-v5": Task(MUJOCO, None, "88755 (XuanCe, PPO)"),
    "Pusher-v5": Task(MUJOCO, None, "-36 (XuanCe, PPO)"),
    "Reacher-v5": Task(MUJOCO, -4.1, "-5.3 (XuanCe, PPO)"),
    "InvertedPendulum-v5": Task(MUJOCO, 1000, "1000 (XuanCe, PPO)"),
    "InvertedDoublePendulum-v5": Task(MUJOCO, 9000, "6383 (XuanCe, A2C)"),
    "Swimmer-v5": Task(SWIMMER, 350, "84 (XuanCe, PPO)", ZOO | {"gamma": 0.9999}),
    "CartPole-v1": Task(
        classic(100_000), 500, "500 (rl-zoo, TRPO)", CARTPOLE | {"n_critic_updates": 20}
    ),
    "Acrobot-v1": Task(
        classic(100_000), -83, "-83.1 (rl-zoo, TRPO)", {"normalize": True, "n_steps": 1024}
    ),
    "Pendulum-v1": Task(classic(100_000), -165, "-172 (rl-zoo, PPO)", PENDULUM | NOISE),
    "MountainCarContinuous-v0": Task(
        classic(50_000), 92, "92.5 (rl-zoo, TRPO)", {"normalize": True} | NOISE
    ),
    "LunarLander-v3": Task(classic(200_000), 150, "167 (XuanCe, PPO)", LANDER),
    "BipedalWalker-v3": Task(classic(1_000_000), None, "182 (rl-zoo, TRPO)", ZOO),
}


def shorter_traces(args: train.Args) -> train.Args:
    """Return settings with two values of λ, and shorter steps where advantages are small.

    The critic's targets keep the λ of the task. The policy's advantages get a shorter one.
    """
    shorter = round(1 - 10 * (1 - args.gamma), 6)
    return replace(args, advantage_floor=0.02, gae_lambda=shorter, critic_lambda=args.gae_lambda)


def adopted(args: train.Args) -> train.Args:
    """Return a task's settings with what the study adopts: on Swimmer, λ stays as it was."""
    made = shorter_traces(args)
    return replace(made, gae_lambda=args.gae_lambda) if args.gamma == SWIMMER.gamma else made


SEARCH = (
    *("HalfCheetah-v5", "Hopper-v5", "Walker2d-v5", "Ant-v5", "Swimmer-v5"),
    *("InvertedDoublePendulum-v5", "Pendulum-v1"),
)
"""The tasks on which settings are chosen."""
HELD_OUT = tuple(env_id for env_id in TASKS if env_id not in SEARCH)
"""All others."""

EARLIER, PEER, RANDOM = "trpo, earlier settings", "sb3-contrib", "random"
"""Trpo without what the study changed, as natural and vanilla are; sb3-contrib's TRPO; and random
actions."""
WITH_MODES = ("HalfCheetah-v5", "Hopper-v5", "Walker2d-v5", "Swimmer-v5")
NEW = ("HumanoidStandup-v5", "Pusher-v5", "BipedalWalker-v3")
"""Tasks that nothing ran on before the study."""
LONG, STEPS = "trpo, 3 million steps", 3_000_000
RUNS = {
    RANDOM: (5, tuple(TASKS)),
    "trpo": (10, tuple(TASKS)),
    EARLIER: (5, tuple(env_id for env_id in TASKS if env_id not in NEW)),
    PEER: (3, tuple(env_id for env_id, task in TASKS.items() if task.zoo)),
    "natural": (3, WITH_MODES),
    "vanilla": (3, WITH_MODES),
    LONG: (3, ("Ant-v5",)),
}
"""How many seeds of each algorithm run, and on which tasks."""
