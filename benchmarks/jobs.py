"""What is run to see how well the step learns: tasks, settings of both libraries, and jobs."""

from __future__ import annotations

import json
import math
from collections.abc import Collection, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import train
from checkpoint import comparable, require_own, require_same
from results import name_of, write_run

MODES = ("trpo", "natural", "vanilla")
"""The algorithms that are this package's."""

EXAMPLE = "examples/advanced/train.py"
"""The loop that runs them."""

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
"""One set of settings for all MuJoCo tasks, but for Swimmer's γ and the λ that follows from it."""

SWIMMER = replace(MUJOCO, env_id="Swimmer-v5", gamma=0.998, gae_lambda=0.99)
"""By the same rule λ = 1 − 5(1 − γ): GAE looks a fifth as far as the discount does."""

CLASSIC = train.Args(
    max_kl=0.03,
    lr=1.0,
    log_std=1.0,
    gamma=0.995,
    gae_lambda=0.975,
    critic_batches=4,
    critic_epochs=10,
)
"""One set of settings for classic control; λ by Swimmer's rule."""

BUDGETS = {
    "CartPole-v1": 100_000,
    "Acrobot-v1": 100_000,
    "Pendulum-v1": 100_000,
    "MountainCarContinuous-v0": 50_000,
    "LunarLander-v3": 200_000,
}
"""Steps that rl-baselines3-zoo gives its TRPO."""

MUJOCO_TASKS: dict[str, train.Args] = {
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
}

CLASSIC_TASKS: dict[str, train.Args] = {
    env_id: replace(CLASSIC, env_id=env_id, total_steps=steps, anneal_steps=steps)
    for env_id, steps in BUDGETS.items()
}

SETTINGS = MUJOCO_TASKS | CLASSIC_TASKS

VANILLA_LR = 0.01
"""Learning rate of vanilla policy gradient, on all tasks; not tuned."""

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
"""What it gives for each task that has an entry; the other three have only its defaults."""


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
            SystemExit: If they were run with other settings, or are of another length.
        """
        lines = self.lines.read_text("utf-8").splitlines() if self.lines.exists() else []
        if lines:
            self.require_own(json.loads(lines[-1]), len(lines))
        return len(lines)

    def require_own(self, line: dict[str, Any], count: int) -> None:
        """Refuse lines that are not of this job.

        Args:
            line: The last one.
            count: How many there are.

        Raises:
            SystemExit: If they were run with other settings, or are of another length.
        """
        if self.algorithm in MODES:
            require_own(self.lines, line["settings"], self.args(self.total_steps))
        else:
            require_same(self.lines, line["settings"], self.settings())
        wanted = self.total_steps * count / self.pieces
        if abs(line["steps"] - wanted) >= self.total_steps / self.pieces:
            raise SystemExit(
                f"{self.lines} has {line['steps']} steps in {count} pieces, where {self.pieces} "
                f"pieces of {self.total_steps} steps make {wanted:.0f}. Go on with the same "
                "--pieces, or give --folder another; if its lines are lost, move away the folder "
                f"{self.name}, which is further than they are."
            )

    def record(self, piece: int, result: dict[str, Any]) -> None:
        """Write the line of a finished piece.

        Args:
            piece: How many are finished before it.
            result: Steps, returns and seconds.

        Raises:
            SystemExit: If the run is not where this piece ends.
        """
        line = {"environment": self.env_id, "algorithm": self.algorithm, "seed": self.seed}
        line |= {**result, "settings": self.settings()}
        self.require_own(line, piece + 1)
        before = self.lines.read_text("utf-8").splitlines()[:piece] if piece else []
        write_run([*before, json.dumps(line)], self.lines)


def changes_of(
    wanted: Mapping[str, float], algorithms: Collection[str]
) -> tuple[tuple[str, float], ...]:
    """Return changes of the example's settings, whole numbers as such.

    Args:
        wanted: Numbers by the names of settings.
        algorithms: Of the runs that they are for.

    Raises:
        SystemExit: If a setting is no number that can be changed, or its number is not whole, or
            some runs would not heed it.
    """
    own = {"seed", "resume", "checkpoint_every"}
    settings = asdict(SETTINGS["HalfCheetah-v5"])
    changes = []
    for name, value in wanted.items():
        now = settings.get(name)
        if name in own:
            raise SystemExit(f"--changes {name}: every run has its own.")
        if not isinstance(now, int | float):
            raise SystemExit(f"--changes {name}: no number in {EXAMPLE} is called that.")
        if not math.isfinite(value):
            raise SystemExit(f"--changes {name} {value}: it is a finite number.")
        if isinstance(now, int) and value != int(value):
            raise SystemExit(f"--changes {name} {value}: it is a whole number.")
        changes.append((name, value if isinstance(now, float) else int(value)))
    if changes and (others := sorted(set(algorithms) - set(MODES))):
        raise SystemExit(f"--changes are of {EXAMPLE}: leave out {', '.join(others)}.")
    return tuple(changes)
