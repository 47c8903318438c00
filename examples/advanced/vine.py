"""Train by vine, the paper's second sampling scheme, or by single path at equal simulator steps.

    python examples/advanced/vine.py --env-id CartPole-v1
    python examples/advanced/vine.py --env-id Swimmer-v5 --sampling single-path
    python examples/advanced/vine.py --env-id ALE/Pong-v5 --total-steps 200000 --checkpoint pong.pt

Vine returns to states of its trajectories and tries several actions from each, all branches of a
state with the same random numbers: all actions where they are few (equation 15), else some that the
policy draws (equation 16). A step of the simulator counts the same wherever it is taken. Killed at
any moment, a run with a ``--checkpoint`` goes on from it, by the same command: bit for bit, but for
convolutions on a GPU, which do not repeat themselves there.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Literal

import ale_py
import checkpoint
import gymnasium as gym
import torch
import tyro
from gymnasium.vector import AutoresetMode, SyncVectorEnv
from processes import seed_of
from torch import Tensor
from tqdm import tqdm
from training_run import mean_of_last
from vine_agent import Agent

from trpo_optim import Closures, StepReport, TrustRegionOptimizer
from trpo_optim.rollouts import (
    Cursor,
    SinglePathBatch,
    ValueFit,
    fit_value,
    gae,
    policy_closure,
    single_path,
    vine,
    vine_closure,
)

gym.register_envs(ale_py)


@dataclass(frozen=True)
class Args:
    """Settings of one run."""

    env_id: str = "CartPole-v1"
    """Gymnasium environment whose state can be captured"""
    sampling: Literal["vine", "single-path"] = "vine"
    """where the data comes from"""
    seed: int = 0
    """seed of the networks, the actions and the environments"""
    total_steps: int = 200_000
    """simulator steps, those of branches included"""
    max_kl: float = 0.01
    """trust-region radius in nats"""
    num_envs: int = 16
    """environments stepped side by side"""
    trunk_steps: int = 64
    """steps of each environment per update"""
    states: int = 64
    """vine: how many states of the trunk to branch from"""
    branches: int = 4
    """vine: actions per state where not all can be tried"""
    horizon: int = 10
    """vine: steps of a branch; then the critic says what the rest is worth"""
    curvature: float | None = None
    """the share of the states that Fisher-vector products are taken on; None: all"""
    gamma: float = 0.99
    """discount factor"""
    gae_lambda: float = 0.95
    """GAE's lambda: of the critic's targets, and of single path's advantages"""
    critic_lr: float = 1e-3
    """the critic's learning rate (Adam)"""
    critic_epochs: int = 20
    """the critic's passes over each trunk"""
    device: str = "cpu"
    """where the networks live: cpu, cuda, ..."""
    checkpoint: Path | None = None
    """file that every update is kept in, and that the run goes on from; None: none"""


def make_envs(args: Args) -> SyncVectorEnv:
    """Return environments whose state vine can restore."""

    def make() -> gym.Env[Any, Any]:
        if not args.env_id.startswith("ALE/"):
            return gym.make(args.env_id)
        # The emulator does not say which action it repeated last; the wrapper does.
        game = gym.make(args.env_id, frameskip=1, repeat_action_probability=0.0)
        frames = gym.wrappers.AtariPreprocessing(game, screen_size=42)
        return gym.wrappers.FrameStackObservation(gym.wrappers.StickyAction(frames, 0.25), 4)

    return SyncVectorEnv([make] * args.num_envs, autoreset_mode=AutoresetMode.SAME_STEP)


@dataclass
class Run:
    """Everything that a run carries from one update to the next."""

    args: Args
    envs: SyncVectorEnv
    agent: Agent
    optimizer: TrustRegionOptimizer
    critic_optimizer: torch.optim.Adam
    end: Cursor | None = None  # where the environments stand
    steps: int = 0
    seconds: float = 0.0
    episodes: list[tuple[int, float]] = field(default_factory=list)
    """for every episode of the trajectories the simulator steps by the end of its update, and its
    return"""

    def recent_return(self) -> float:
        """Mean return of the last 20 episodes."""
        return mean_of_last(self.episodes)


def new_run(args: Args) -> Run:
    """Build environments, networks and optimizers."""
    torch.manual_seed(args.seed)
    envs = make_envs(args)
    agent = Agent(envs, args.device)
    parameters = [*agent.policy.parameters(), agent.log_std]
    return Run(
        args=args,
        envs=envs,
        agent=agent,
        optimizer=TrustRegionOptimizer(parameters, max_kl=args.max_kl),
        critic_optimizer=torch.optim.Adam(agent.critic.parameters(), lr=args.critic_lr),
    )


FIGURES = ("steps", "seconds", "episodes")
STATEFUL = ("agent", "optimizer", "critic_optimizer")
"""What a checkpoint takes from a run as it is, and as its ``state_dict()``."""


def save(run: Run, path: Path) -> None:
    """Write the run's checkpoint."""
    content = {
        "args": checkpoint.comparable(run.args),
        **{name: getattr(run, name) for name in FIGURES},
        **{name: getattr(run, name).state_dict() for name in STATEFUL},
        "scaled": checkpoint.dump(run.agent.scaled.stats),
        "environments": checkpoint.pack(run.envs, run.end),
        **checkpoint.random_state(),
    }
    checkpoint.write(content, path)


def load(run: Run, path: Path) -> None:
    """Take up a run where its checkpoint left it.

    A checkpoint holds pickled environments: load none that you do not trust.

    Args:
        run: A new run.
        path: Where the checkpoint is.

    Raises:
        SystemExit: If it was made with other settings.
    """
    content = torch.load(path, map_location="cpu", weights_only=True)
    checkpoint.require_own(path, content["args"], run.args)
    for name in FIGURES:
        setattr(run, name, content[name])
    for name in STATEFUL:
        getattr(run, name).load_state_dict(content[name])
    checkpoint.fill(run.agent.scaled.stats, content["scaled"])
    run.agent.scaled.refresh()
    run.end = checkpoint.unpack(content["environments"], run.envs, run.args.env_id)
    checkpoint.set_random_state(content)


def collect(run: Run) -> tuple[SinglePathBatch, Callable[[Tensor], Closures], int]:
    """Return trajectories, what makes the step's closures of their advantages, and their price."""
    args, agent = run.args, run.agent
    seed = seed_of(args.seed, run.steps) if run.end is None else None
    if args.sampling == "single-path":
        path = single_path(
            run.envs,
            agent.act,
            steps=args.trunk_steps,
            after=run.end,
            seed=seed,
            device=args.device,
        )
        closures = partial(
            policy_closure, agent.act, path, standardise=True, curvature=args.curvature
        )
        return path, closures, int(path.valid.sum())
    batch = vine(
        run.envs,
        agent.act,
        steps=args.trunk_steps,
        states=args.states,
        branches=None if agent.discrete else args.branches,
        horizon=args.horizon,
        gamma=args.gamma,
        critic=agent.value,
        after=run.end,
        seed=seed,
        device=args.device,
    )
    of_vine = partial(vine_closure, agent.act, batch, curvature=args.curvature)
    return batch.trunk, lambda _: of_vine(), batch.steps


def improve(run: Run) -> tuple[StepReport, ValueFit]:
    """Collect, take one step of the policy, and fit the critic."""
    args, agent = run.args, run.agent
    start = time.perf_counter()
    path, closures, price = collect(run)
    run.end = path.end
    run.steps += price
    values, following = path.values(agent.value)
    advantages = gae(
        path.rewards,
        values,
        following,
        path.ends,
        gamma=args.gamma,
        gae_lambda=args.gae_lambda,
    )
    report = run.optimizer.step(closures(advantages))
    observations = path.flat(path.observations)
    fit = fit_value(
        agent.value,
        observations,
        path.flat(advantages + values),
        run.critic_optimizer,
        epochs=args.critic_epochs,
        minibatch=128,
    )
    agent.count(observations)
    run.episodes += [(run.steps, value) for value in path.episode_returns]
    run.seconds += time.perf_counter() - start
    return report, fit


def train(args: Args) -> Run:
    """Train one agent from beginning to end, or from its checkpoint.

    Args:
        args: The settings.

    Returns:
        The finished run.

    Raises:
        SystemExit: If the checkpoint was made with other settings.
    """
    torch.set_num_threads(1)
    run = new_run(args)
    if args.checkpoint is not None and args.checkpoint.exists():
        load(run, args.checkpoint)
        print(f"{args.checkpoint} goes on from step {run.steps}.")
    with tqdm(total=args.total_steps, initial=run.steps, unit="step") as progress:
        while run.steps < args.total_steps:
            report, fit = improve(run)
            if args.checkpoint is not None:
                save(run, args.checkpoint)
            progress.update(run.steps - progress.n)
            progress.set_postfix_str(
                f"return {run.recent_return():.1f}, KL {report.kl:.4f}, "
                f"critic {fit.explained_variance:.2f}, {report.outcome.name}"
            )
    run.envs.close()
    print(
        f"{args.env_id} {args.sampling} seed {args.seed}: mean return of the last 20 episodes "
        f"{run.recent_return():.1f} after {run.steps} simulator steps, {len(run.episodes)} episodes"
    )
    return run


if __name__ == "__main__":
    train(tyro.cli(Args))
