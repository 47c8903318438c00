"""Learning curves of this package's modes and of sb3-contrib's TRPO, job by job.

    make bench-learning

A job is one environment, algorithm and seed. It is advanced in pieces, side by side with others;
after each piece the policy is evaluated and one line of JSON written to runs/learning. Killed at
any moment, the same command goes on from the last finished piece of every job; jobs that
docs/results/results.jsonl.xz holds are finished. benchmarks/learning_report.py makes
docs/results/learning.md of the lines.
"""

from __future__ import annotations

import contextlib
import os
import time
from collections import deque
from concurrent.futures import FIRST_COMPLETED, Future, wait
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import agent
import train
import tyro
from evaluation import EPISODES, first_start, returns_at_random, returns_of
from jobs import SB3, SETTINGS, Job, changes_of
from results import ARCHIVE, pieces_of, unpacked
from sb3_contrib import TRPO
from scores import ALGORITHMS
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.evaluation import evaluate_policy
from stable_baselines3.common.vec_env import VecNormalize
from tqdm import tqdm
from workers import pool

RESTART = 1_000_000
"""How far apart the random seeds of a run's pieces are; evaluations have those in between."""


def advance(job: Job, piece: int) -> None:
    """Train one piece further, evaluate, and write the line of it."""
    steps = job.total_steps * (piece + 1) // job.pieces
    start = time.perf_counter()
    if job.algorithm == "sb3-contrib":
        result = _sb3(job, steps, piece)
    elif job.algorithm == "random":
        result = _random(job, steps)
    else:
        result = _ours(job, steps)
    job.record(piece, {**result, "seconds": round(time.perf_counter() - start, 1)})


def _random(job: Job, steps: int) -> dict[str, Any]:
    envs = agent.make_envs(replace(job.args(steps), num_envs=EPISODES))
    returns = returns_at_random(envs, job.seed)
    return {"steps": steps, "sampled": returns, "deterministic": returns}


def _ours(job: Job, steps: int) -> dict[str, Any]:
    with Path(os.devnull).open("w") as nowhere, contextlib.redirect_stdout(nowhere):
        run = train.train(job.args(steps))
    envs = agent.make_envs(replace(run.args, num_envs=EPISODES))
    return {"steps": run.step, **returns_of(envs, run.act, job.seed)}


def _sb3(job: Job, steps: int, done: int) -> dict[str, Any]:
    folder = job.folder / job.name
    folder.mkdir(parents=True, exist_ok=True)
    envs = make_vec_env(job.env_id, n_envs=2, seed=job.seed)
    settings = {"normalize": False, "gamma": 0.99} | SB3[job.env_id]
    scaled = settings.pop("normalize")
    if done:
        normalised = VecNormalize.load(str(folder / f"{done}.pkl"), envs)
        model = TRPO.load(folder / f"{done}.zip", normalised, device="cpu")
        model.set_random_seed(RESTART * done + job.seed)  # loading set that of the start again
    else:
        normalised = VecNormalize(
            envs, norm_obs=scaled, norm_reward=scaled, gamma=settings["gamma"]
        )
        model = TRPO("MlpPolicy", normalised, seed=job.seed, device="cpu", **settings)
    model.learn(steps - model.num_timesteps, reset_num_timesteps=False)
    model.save(folder / f"{done + 1}.zip")
    normalised.save(str(folder / f"{done + 1}.pkl"))
    judged = VecNormalize(
        make_vec_env(job.env_id, n_envs=1, seed=first_start(job.seed)),
        training=False,
        norm_obs=scaled,
        norm_reward=False,
    )
    if scaled:
        judged.obs_rms = normalised.obs_rms
    returns = {
        name: evaluate_policy(
            model,
            judged,
            EPISODES,
            deterministic=deterministic,
            callback=_new_noise if model.use_sde else None,
            return_episode_rewards=True,
        )[0]
        for name, deterministic in (("sampled", False), ("deterministic", True))
    }
    return {"steps": model.num_timesteps, **returns}


def _new_noise(now: dict[str, Any], _: dict[str, Any]) -> None:
    """Draw state-dependent noise as often as in training, where an evaluation draws it once."""
    if now["current_lengths"][0] % now["model"].sde_sample_freq == 0:
        now["model"].policy.reset_noise()


@dataclass(frozen=True)
class Settings:
    """Which jobs to run."""

    environments: tuple[str, ...] = tuple(SETTINGS)
    """the tasks; sb3-contrib takes those that it has published settings for"""
    algorithms: tuple[str, ...] = ("trpo",)
    """trpo, natural, vanilla, sb3-contrib, random"""
    seeds: int = 5
    """runs of each"""
    first_seed: int = 0
    """the first of their seeds"""
    pieces: int = 10
    """evaluations of each run"""
    workers: int = 2
    """runs side by side"""
    folder: Path = Path("runs/learning")
    """where lines and checkpoints go"""
    changes: dict[str, float] | None = None
    """settings to change, for a study: --changes max_kl 0.02"""


def main(settings: Settings) -> None:
    """Advance all jobs to their ends.

    Args:
        settings: Which.

    Raises:
        SystemExit: If a name is not known, a study's runs would get into the archive, or changes
            cannot be made.
    """
    study = settings.changes is not None or settings.first_seed != Settings().first_seed
    if study and settings.folder.resolve() == Settings().folder.resolve():
        raise SystemExit(
            "--changes and --first-seed make a study's runs, and those of "
            f"{settings.folder} go into {ARCHIVE}: give --folder another."
        )
    for wanted, known in (
        (settings.environments, tuple(SETTINGS)),
        (settings.algorithms, (*ALGORITHMS, "random")),
    ):
        if unknown := sorted(set(wanted) - set(known)):
            raise SystemExit(f"{', '.join(unknown)}: not known here. There are {', '.join(known)}.")
    os.environ["TQDM_DISABLE"] = "1"  # one bar for all runs, not one each
    settings.folder.mkdir(parents=True, exist_ok=True)
    if not study:
        unpacked(ARCHIVE, settings.folder)
    changes = changes_of(settings.changes or {}, settings.algorithms)
    jobs = [
        Job(
            env_id, algorithm, seed, settings.folder, pieces_of(algorithm, settings.pieces), changes
        )
        for seed in range(settings.first_seed, settings.first_seed + settings.seeds)
        for algorithm in settings.algorithms
        for env_id in settings.environments
        if algorithm != "sb3-contrib" or env_id in SB3
    ]
    begun = [(job, job.done()) for job in jobs]
    waiting = deque((job, done) for job, done in begun if done < job.pieces)
    running: dict[Future[None], tuple[Job, int]] = {}
    total = sum(job.pieces for job in jobs)
    finished = sum(done for _, done in begun)
    with (
        pool(settings.workers) as workers,
        tqdm(total=total, initial=finished, unit="piece", disable=False) as progress,
    ):
        while waiting or running:
            while waiting and len(running) < settings.workers:
                job, piece = waiting.popleft()
                running[workers.submit(advance, job, piece)] = job, piece
            done, _ = wait(running, return_when=FIRST_COMPLETED)
            for future in done:
                job, piece = running.pop(future)
                future.result()
                progress.update()
                progress.set_postfix_str(job.name)
                if piece + 1 < job.pieces:
                    waiting.appendleft((job, piece + 1))


if __name__ == "__main__":
    main(tyro.cli(Settings))
