"""Learning curves of this package's modes and of sb3-contrib's TRPO, job by job.

    make bench-learning

A job is one environment, algorithm and seed. It is advanced in pieces, side by side with others;
after each piece the policy is evaluated and one line of JSON written to runs/learning. Killed at
any moment, the same command goes on where it stopped; jobs that docs/results.jsonl.xz holds are
finished. benchmarks/learning_report.py makes docs/results.md of the lines.
"""

from __future__ import annotations

import contextlib
import json
import os
import time
from collections import deque
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
import train
import tyro
from checkpoint import comparable, complete, require_same
from evaluation import EPISODES, first_start, returns_at_random, returns_of
from results import ARCHIVE, name_of, pieces_of, unpacked
from sb3_contrib import TRPO
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.evaluation import evaluate_policy
from stable_baselines3.common.vec_env import VecNormalize
from tqdm import tqdm

MUJOCO = train.Args(
    total_steps=1_000_000,
    anneal_start=500_000,
    anneal_steps=1_000_000,
    num_envs=4,
    batch_size=2048,
    max_kl=0.007,
    log_std=0.8,
    per_dimension=True,
    gae_lambda=0.95,
    critic_batches=4,
    critic_epochs=5,
)
"""One set of settings for all MuJoCo tasks, but for Swimmer's γ and the λ that follows from it."""

SWIMMER = replace(MUJOCO, env_id="Swimmer-v5", gamma=0.998, gae_lambda=0.99)
"""By the same rule λ = 1 − 5(1 − γ): GAE looks a fifth as far as the discount does."""

CLASSIC = train.Args(max_kl=0.03, log_std=1.0, gae_lambda=0.98, critic_batches=4, critic_epochs=5)
"""One set of settings for classic control."""

BUDGETS = {
    "CartPole-v1": 100_000,
    "Acrobot-v1": 100_000,
    "Pendulum-v1": 100_000,
    "MountainCarContinuous-v0": 50_000,
    "LunarLander-v3": 200_000,
}
"""Steps that rl-baselines3-zoo gives its TRPO."""

SETTINGS: dict[str, train.Args] = {
    **{
        env_id: replace(MUJOCO, env_id=env_id)
        for env_id in (
            "HalfCheetah-v5",
            "Hopper-v5",
            "Walker2d-v5",
            "Ant-v5",
            "Humanoid-v5",
            "Reacher-v5",
            "InvertedPendulum-v5",
            "InvertedDoublePendulum-v5",
        )
    },
    "Swimmer-v5": SWIMMER,
    **{
        env_id: replace(CLASSIC, env_id=env_id, total_steps=steps, anneal_steps=steps)
        for env_id, steps in BUDGETS.items()
    },
}

SB3_MUJOCO: dict[str, Any] = {
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
"""What rl-baselines3-zoo's hyperparams/trpo.yml gives for MuJoCo, with two environments."""

SB3: dict[str, dict[str, Any]] = {
    "HalfCheetah-v5": SB3_MUJOCO | {"target_kl": 0.04},
    "Hopper-v5": SB3_MUJOCO,
    "Walker2d-v5": SB3_MUJOCO,
    "Ant-v5": SB3_MUJOCO,
    "Humanoid-v5": SB3_MUJOCO,
    "Swimmer-v5": SB3_MUJOCO | {"gamma": 0.9999},
    "CartPole-v1": {
        "n_steps": 512,
        "batch_size": 512,
        "cg_damping": 1e-3,
        "gae_lambda": 0.98,
        "n_critic_updates": 20,
    },
    "Acrobot-v1": {"normalize": True, "n_steps": 1024},
    "Pendulum-v1": {
        "n_steps": 1024,
        "gamma": 0.9,
        "n_critic_updates": 15,
        "use_sde": True,
        "sde_sample_freq": 4,
    },
    "MountainCarContinuous-v0": {"normalize": True, "use_sde": True, "sde_sample_freq": 4},
    "LunarLander-v3": {
        "n_steps": 512,
        "cg_damping": 0.01,
        "gae_lambda": 0.98,
        "n_critic_updates": 15,
    },
}
"""What it gives for each task that it has an entry for; it has none for the other three."""


@dataclass(frozen=True)
class Job:
    """One training run."""

    env_id: str
    algorithm: str  # "trpo", "natural", "vanilla", "sb3-contrib" or "random"
    seed: int
    folder: Path
    pieces: int
    changes: tuple[tuple[str, Any], ...] = ()  # of the settings

    @property
    def name(self) -> str:
        """What its files are called."""
        return name_of(self.env_id, self.algorithm, self.seed)

    @property
    def lines(self) -> Path:
        """Where its evaluations are written."""
        return self.folder / f"{self.name}.jsonl"

    @property
    def total_steps(self) -> int:
        """How long it is, in environment steps."""
        whole: int = dict(self.changes).get("total_steps", SETTINGS[self.env_id].total_steps)
        return whole

    def args(self, total_steps: int) -> train.Args:
        """Return the example's settings up to so many steps."""
        own = {"lr": VANILLA_LR} if self.algorithm == "vanilla" else {}
        mode = "trpo" if self.algorithm == "random" else self.algorithm
        changes: dict[str, Any] = {"mode": mode, **own, **dict(self.changes)}
        changes["total_steps"] = total_steps
        return replace(
            SETTINGS[self.env_id],
            seed=self.seed,
            run_dir=self.folder / self.name,
            resume=True,
            checkpoint_every=10**9,  # at the end of the piece
            **changes,
        )

    def settings(self) -> dict[str, Any]:
        """Return what it is run with, as its lines say it."""
        if self.algorithm == "random":
            return {}
        if self.algorithm == "sb3-contrib":
            return SB3[self.env_id]
        return comparable(self.args(self.total_steps))

    def done(self) -> int:
        """Return how many pieces are finished.

        Raises:
            SystemExit: If they were run with other settings.
        """
        lines = self.lines.read_text("utf-8").splitlines() if self.lines.exists() else []
        for line in lines[-1:]:
            saved = complete(json.loads(line)["settings"], train.Args())
            require_same(self.lines, saved, self.settings())
        return len(lines)


VANILLA_LR = 0.01
"""Learning rate of vanilla policy gradient; no one value fits all tasks."""


def advance(job: Job, piece: int) -> None:
    """Train one piece further, evaluate, and append a line."""
    steps = job.total_steps * (piece + 1) // job.pieces
    start = time.perf_counter()
    train_and_judge = {"sb3-contrib": _sb3, "random": _random}.get(job.algorithm, _ours)
    result = train_and_judge(job, steps)
    line = {"environment": job.env_id, "algorithm": job.algorithm, "seed": job.seed, **result}
    line |= {"seconds": round(time.perf_counter() - start, 1), "settings": job.settings()}
    with job.lines.open("a", encoding="utf-8") as file:
        file.write(json.dumps(line) + "\n")
        file.flush()
        os.fsync(file.fileno())


def _random(job: Job, steps: int) -> dict[str, Any]:
    envs = train.make_envs(replace(job.args(steps), num_envs=EPISODES))
    returns = returns_at_random(envs, job.seed)
    return {"steps": steps, "sampled": returns, "deterministic": returns}


def _ours(job: Job, steps: int) -> dict[str, Any]:
    with Path(os.devnull).open("w") as nowhere, contextlib.redirect_stdout(nowhere):
        run = train.train(job.args(steps))
    envs = train.make_envs(replace(run.args, num_envs=EPISODES))
    return {"steps": run.step, **returns_of(envs, run.act, job.seed)}


def _sb3(job: Job, steps: int) -> dict[str, Any]:
    folder = job.folder / job.name
    folder.mkdir(parents=True, exist_ok=True)
    envs = make_vec_env(job.env_id, n_envs=2, seed=job.seed)
    settings = {"normalize": False, "gamma": 0.99} | SB3[job.env_id]
    scaled = settings.pop("normalize")
    if done := job.done():
        normalised = VecNormalize.load(str(folder / f"{done}.pkl"), envs)
        model = TRPO.load(folder / f"{done}.zip", normalised, device="cpu")
        model.set_random_seed(job.seed + 1000 * done)  # loading set that of the start again
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


def _quietly() -> None:
    """Prepare a worker: one thread, and no progress bar but the one of all jobs."""
    torch.set_num_threads(1)
    setattr(train, "tqdm", _no_bar)  # noqa: B010 (typed as the class)


def _no_bar(**options: Any) -> tqdm[Any]:
    return tqdm(**{**options, "disable": True})


@dataclass(frozen=True)
class Settings:
    """Which jobs to run."""

    environments: tuple[str, ...] = tuple(SETTINGS)
    """the tasks; sb3-contrib takes those that it has published settings for"""
    algorithms: tuple[str, ...] = ("trpo",)
    """trpo, natural, vanilla, sb3-contrib, random"""
    seeds: int = 5
    """runs of each"""
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
        SystemExit: If runs of other settings would get into the archive.
    """
    if settings.changes is not None and settings.folder == Settings().folder:
        raise SystemExit(
            f"--changes in {settings.folder}, whose runs go into {ARCHIVE}: give --folder another."
        )
    settings.folder.mkdir(parents=True, exist_ok=True)
    if settings.changes is None:
        unpacked(ARCHIVE, settings.folder)
    defaults = asdict(train.Args())
    changes = tuple(
        (name, value if isinstance(defaults[name], float) else int(value))
        for name, value in (settings.changes or {}).items()
    )
    jobs = [
        Job(
            env_id, algorithm, seed, settings.folder, pieces_of(algorithm, settings.pieces), changes
        )
        for seed in range(settings.seeds)
        for algorithm in settings.algorithms
        for env_id in settings.environments
        if algorithm != "sb3-contrib" or env_id in SB3
    ]
    waiting = deque((job, job.done()) for job in jobs if job.done() < job.pieces)
    running: dict[Future[None], tuple[Job, int]] = {}
    total = sum(job.pieces for job in jobs)
    finished = sum(min(job.done(), job.pieces) for job in jobs)
    with (
        ProcessPoolExecutor(settings.workers, initializer=_quietly) as pool,
        tqdm(total=total, initial=finished, unit="piece") as progress,
    ):
        while waiting or running:
            while waiting and len(running) < settings.workers:
                job, piece = waiting.popleft()
                running[pool.submit(advance, job, piece)] = job, piece
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
