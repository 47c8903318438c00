"""Learning curves of this package's modes and of sb3-contrib's TRPO.

    make bench-learning

Finished runs are lines of docs/results/results.jsonl.xz, one for each evaluation. Killed at any
moment, the same command makes the runs that are missing. At the end, it fills the tables of
docs/results/learning.md and draws its pictures.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import agent
import archived_runs
import learning_report
import tasks
import torch
import train
import tyro
from archived_runs import Line
from checkpoint import comparable
from evaluation import EPISODES, first_start, returns_at_random, returns_of
from sb3_contrib import TRPO
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.evaluation import evaluate_policy
from stable_baselines3.common.vec_env import VecNormalize
from tasks import LONG, PEER, RANDOM, RUNS, STEPS, TASKS, VANILLA_LR, adopted

ARCHIVE = Path("docs/results/results.jsonl.xz")
DEFAULTS = comparable(train.Args())


def case(env_id: str, algorithm: str, seed: int) -> Line:
    """Return a run of the benchmark, and what it is made with."""
    task = TASKS[env_id]
    args = replace(task.args, env_id=env_id, seed=seed)
    if algorithm in ("trpo", LONG):
        args = adopted(args)
    if algorithm == LONG:
        args = replace(args, total_steps=STEPS, anneal_start=STEPS // 2, anneal_steps=STEPS)
    if algorithm == "natural":
        args = replace(args, mode="natural")
    if algorithm == "vanilla":
        args = replace(args, mode="vanilla", lr=VANILLA_LR)
    own = {PEER: task.zoo, RANDOM: {}}.get(algorithm, comparable(args)) or {}
    length = {"total_steps": args.total_steps, "pieces": 1 if algorithm == RANDOM else 10}
    identity = {"environment": env_id, "algorithm": algorithm, "seed": seed}
    return {**identity, "settings": own | length}


def cases() -> list[Line]:
    """Return all runs of the benchmark, seed by seed."""
    return [
        case(env_id, algorithm, seed)
        for seed in range(max(seeds for seeds, _ in RUNS.values()))
        for algorithm, (seeds, env_ids) in RUNS.items()
        for env_id in env_ids
        if seed < seeds
    ]


def play(case: Line) -> list[Line]:
    """Make a run; return what its evaluations came to, with the CPU seconds of each piece."""
    pieces = {PEER: _peer, RANDOM: _random}.get(case["algorithm"], _own)(case)
    lines, start = [], time.process_time()
    for result in pieces:
        lines.append({**result, "cpu": round(time.process_time() - start, 1)})
        start = time.process_time()
    return lines


def _own(case: Line) -> Iterator[Line]:
    """Train by this package, piece by piece, and evaluate after each."""
    settings = dict(case["settings"])
    pieces = settings.pop("pieces")
    run = train.new_run(train.Args(**settings))
    for piece in range(1, pieces + 1):
        while run.step + run.args.batch_size <= run.args.total_steps * piece // pieces:
            train.improve(run, train.collect(run))
            run.update += 1
        envs = agent.make_envs(replace(run.args, num_envs=EPISODES))
        with torch.random.fork_rng():  # training does not depend on how often it is evaluated
            returns = returns_of(envs, run.act, run.args.seed)
        yield {"steps": run.step, "training": run.recent_return(), **returns}
    run.envs.close()


def _random(case: Line) -> Iterator[Line]:
    args = replace(TASKS[case["environment"]].args, env_id=case["environment"], num_envs=EPISODES)
    returns = returns_at_random(agent.make_envs(args), case["seed"])
    yield {"steps": args.total_steps, "sampled": returns, "deterministic": returns}


def _peer(case: Line) -> Iterator[Line]:
    env_id, seed = case["environment"], case["seed"]
    settings = {"normalize": False, "gamma": 0.99} | case["settings"]
    scaled, pieces, total = (settings.pop(key) for key in ("normalize", "pieces", "total_steps"))
    scaling = {"norm_obs": scaled, "norm_reward": scaled, "gamma": settings["gamma"]}
    envs = VecNormalize(make_vec_env(env_id, n_envs=2, seed=seed), **scaling)
    model = TRPO("MlpPolicy", envs, seed=seed, device="cpu", **settings)
    noise = _new_noise if model.use_sde else None
    how: Any = {"callback": noise, "return_episode_rewards": True}
    for piece in range(1, pieces + 1):
        left = total * piece // pieces - model.num_timesteps
        model.learn(left, reset_num_timesteps=False)
        judged = VecNormalize(
            make_vec_env(env_id, n_envs=1, seed=first_start(seed)),
            training=False,
            norm_obs=scaled,
            norm_reward=False,
        )
        if scaled:
            judged.obs_rms = envs.obs_rms
        with torch.random.fork_rng():
            returns = {
                kind: evaluate_policy(model, judged, EPISODES, deterministic=likeliest, **how)[0]
                for kind, likeliest in (("sampled", False), ("deterministic", True))
            }
        yield {"steps": model.num_timesteps, **returns}


def _new_noise(now: dict[str, Any], _: dict[str, Any]) -> None:
    """Draw state-dependent noise as often as in training, where an evaluation draws it once."""
    if now["current_lengths"][0] % now["model"].sde_sample_freq == 0:
        now["model"].policy.reset_noise()


def main(only: str = "", workers: int = 2, report: bool = False) -> None:
    """Make the runs that are missing, and fill the page.

    Args:
        only: A task or an algorithm, to make its runs alone; all by default.
        workers: Runs side by side.
        report: Fill the page of the finished runs, and run nothing.

    Raises:
        SystemExit: If there is no such task or algorithm.
    """
    if not report:
        chosen = [each for each in cases() if only in ("", each["environment"], each["algorithm"])]
        if not chosen:
            raise SystemExit(f"{only!r} is neither a task nor an algorithm of {tasks.__file__}.")
        archived_runs.make(ARCHIVE, chosen, play, DEFAULTS, workers)
    learning_report.write(archived_runs.finished(ARCHIVE, cases(), DEFAULTS))


if __name__ == "__main__":
    tyro.cli(main)
