"""Learning curves of this package's modes and of sb3-contrib's TRPO, run by run.

    make bench-learning

Runs are made in pieces, side by side with others. After each piece the policy is evaluated and one
line of JSON written to runs/learning. Killed at any moment, the same command goes on from the last
finished piece of every run; runs that docs/results/results.jsonl.xz holds are finished.
benchmarks/learning_report.py fills docs/results/learning.md.
"""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Sequence
from concurrent.futures import as_completed
from dataclasses import replace
from pathlib import Path
from typing import Any

import agent
import train
import tyro
from evaluation import EPISODES, first_start, returns_at_random, returns_of
from jobs import PEER, RANDOM, Job
from results import Line, by_run, lines_of
from sb3_contrib import TRPO
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.evaluation import evaluate_policy
from stable_baselines3.common.vec_env import VecNormalize
from tasks import ADOPTED, TASKS, VANILLA_LR
from tqdm import tqdm
from workers import pool

ARCHIVE, FOLDER = Path("docs/results/results.jsonl.xz"), Path("runs/learning")
EARLIER = "trpo, earlier settings"
"""What the runs are called that are without ``ADOPTED``."""
WITH_MODES = ("HalfCheetah-v5", "Hopper-v5", "Walker2d-v5", "Swimmer-v5")
WITH_ZOO = tuple(env_id for env_id, task in TASKS.items() if task.zoo)
RUNS = {
    "trpo": (10, tuple(TASKS)),
    RANDOM: (5, tuple(TASKS)),
    PEER: (3, WITH_ZOO),
    "natural": (3, WITH_MODES),
    "vanilla": (3, WITH_MODES),
}
"""How many seeds of each algorithm run, and on which tasks."""
RESTART = 1_000_000
"""How far apart the random seeds of a run's pieces are; evaluations have those in between."""


def job_of(env_id: str, algorithm: str, seed: int, folder: Path = FOLDER) -> Job:
    """Return a run of the benchmark."""
    args = replace(TASKS[env_id].args, env_id=env_id, seed=seed)
    if algorithm != EARLIER:
        args = replace(args, **ADOPTED)
    if algorithm == "natural":
        args = replace(args, mode="natural")
    if algorithm == "vanilla":
        args = replace(args, mode="vanilla", lr=VANILLA_LR)
    return Job(env_id, algorithm, seed, folder, args, 1 if algorithm == RANDOM else 10)


def advance(job: Job, piece: int) -> None:
    """Train one piece further, evaluate, and write the line of it."""
    steps = job.args.total_steps * (piece + 1) // job.pieces
    start = time.process_time()
    result = {PEER: _peer, RANDOM: _random}.get(job.algorithm, _own)(job, steps, piece)
    job.record({**result, "cpu": round(time.process_time() - start, 1)})


def _random(job: Job, steps: int, _: int) -> Line:
    returns = returns_at_random(agent.make_envs(replace(job.args, num_envs=EPISODES)), job.seed)
    return {"steps": steps, "sampled": returns, "deterministic": returns}


def _own(job: Job, steps: int, _: int) -> Line:
    once = 10**9  # a checkpoint at the end of the piece
    args = replace(job.args, run_dir=job.folder / job.name, resume=True, checkpoint_every=once)
    with Path(os.devnull).open("w") as nowhere, contextlib.redirect_stdout(nowhere):
        run = train.train(replace(args, total_steps=steps))
    if run.step > steps:
        raise SystemExit(
            f"{args.folder()} is at step {run.step}, and {job.lines} has no line of the piece that "
            f"ends at step {steps}. Move both away, and the run begins anew."
        )
    envs = agent.make_envs(replace(args, num_envs=EPISODES, stagger=False))
    returns = returns_of(envs, run.act, job.seed)
    return {"steps": run.step, "training": run.recent_return(), **returns}


def _peer(job: Job, steps: int, piece: int) -> Line:
    folder = job.folder / job.name
    folder.mkdir(parents=True, exist_ok=True)
    envs = make_vec_env(job.env_id, n_envs=2, seed=job.seed)
    settings = {"normalize": False, "gamma": 0.99} | (TASKS[job.env_id].zoo or {})
    scaled = settings.pop("normalize")
    if piece:
        normalised = VecNormalize.load(str(folder / f"{piece}.pkl"), envs)
        model = TRPO.load(folder / f"{piece}.zip", normalised, device="cpu")
        model.set_random_seed(RESTART * piece + job.seed)  # loading set that of the start again
    else:
        scaling = {"norm_obs": scaled, "norm_reward": scaled, "gamma": settings["gamma"]}
        normalised = VecNormalize(envs, **scaling)
        model = TRPO("MlpPolicy", normalised, seed=job.seed, device="cpu", **settings)
    model.learn(steps - model.num_timesteps, reset_num_timesteps=False)
    model.save(folder / f"{piece + 1}.zip")
    normalised.save(str(folder / f"{piece + 1}.pkl"))
    starts = make_vec_env(job.env_id, n_envs=1, seed=first_start(job.seed))
    judged = VecNormalize(starts, training=False, norm_obs=scaled, norm_reward=False)
    if scaled:
        judged.obs_rms = normalised.obs_rms
    noise = _new_noise if model.use_sde else None
    how = {"callback": noise, "return_episode_rewards": True}
    return {
        "steps": model.num_timesteps,
        "sampled": evaluate_policy(model, judged, EPISODES, deterministic=False, **how)[0],
        "deterministic": evaluate_policy(model, judged, EPISODES, **how)[0],
    }


def _new_noise(now: dict[str, Any], _: dict[str, Any]) -> None:
    """Draw state-dependent noise as often as in training, where an evaluation draws it once."""
    if now["current_lengths"][0] % now["model"].sde_sample_freq == 0:
        now["model"].policy.reset_noise()


def finish(job: Job) -> None:
    """Make the pieces of a run that are not finished."""
    for piece in range(job.done(), job.pieces):
        advance(job, piece)


def play(jobs: Sequence[Job], archive: Path, workers: int) -> None:
    """Make the runs that are not in an archive, or the rest of them, so many side by side."""
    os.environ["TQDM_DISABLE"] = "1"  # one bar for all runs, not one each
    archived = by_run(lines_of(archive))
    for job in jobs:
        for line in archived.get(job.name, [])[-1:]:
            job.require_own(line, archive)
    left = [job for job in jobs if job.name not in archived and job.done() < job.pieces]
    with pool(workers) as processes:
        runs = [processes.submit(finish, job) for job in left]
        try:
            done, total = len(jobs) - len(left), len(jobs)
            for run in tqdm(
                as_completed(runs), initial=done, total=total, unit="run", disable=False
            ):
                run.result()
        finally:
            processes.shutdown(cancel_futures=True)  # after a failure, start no further run


def main(only: str = "", workers: int = 2, folder: Path = FOLDER) -> None:
    """Make the runs that are not finished.

    Args:
        only: Part of the names of the runs to make, such as Hopper-v5__trpo; all by default.
        workers: Runs side by side.
        folder: Where lines and checkpoints go.
    """
    jobs = [
        job_of(env_id, algorithm, seed, folder)
        for seed in range(max(seeds for seeds, _ in RUNS.values()))
        for algorithm, (seeds, env_ids) in RUNS.items()
        for env_id in env_ids
        if seed < seeds
    ]
    play([job for job in jobs if only in job.name], ARCHIVE, workers)


if __name__ == "__main__":
    tyro.cli(main)
